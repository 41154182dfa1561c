"""What both suites test: small models of VW-LMM and of LLaVA on the same text model and vision tower."""

TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 580,
    "initializer_range": 0.02,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "initializer_range": 0.02,
}
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
# An image token that is a row of the embeddings, and one that is none, as after `vwlmm convert`
WITHIN, BEYOND = 4, TEXT["vocab_size"]


def small_config(config_class, image_token_id):
    return config_class(
        text_config=dict(TEXT),
        vision_config=dict(VISION),
        image_token_index=image_token_id,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
