"""Tiny random models of every supported kind, with batches for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    ResNetConfig,
    SiglipVisionConfig,
)

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM


VOCAB_SIZE = 99
# An image token just beyond the vocabulary, the usual case here, inside it, and beyond other tokens added before it
IMAGE_BEYOND, IMAGE_WITHIN, IMAGE_FAR_BEYOND = 99, 98, 1234
IMAGE = "image"
# A row each: lengths of its texts, and its images. The last one starts with an image
ROWS = ((6,), (3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 2), (IMAGE, 3))
TEXT_ROWS = ((6,), (4,))

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_VIT = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}

LLM_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
LLMS = [f"{name}{tied}" for name in LLM_CONFIGS for tied in ("", "-tied")]
# Tower: its config, how its features are read, the grid of patches that an image becomes
TOWERS = {
    "clip": (
        lambda: CLIPVisionConfig(**_VIT, intermediate_size=20, image_size=16),
        {"vision_feature_layer": -2},
        (2, 2),
    ),
    "siglip": (
        lambda: SiglipVisionConfig(**_VIT, intermediate_size=20, image_size=24),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        (3, 3),
    ),
    "dinov2": (
        lambda: Dinov2Config(**_VIT, mlp_ratio=2, image_size=24),
        {"vision_feature_layer": [-2, -1]},
        (3, 3),
    ),
    "resnet": (
        lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], image_size=(16, 32)),
        {"vision_feature_layer": -1},
        (2, 4),
    ),
    "convnext": (
        lambda: ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], image_size=(32, 16)),
        {"vision_feature_layer": -1},
        (4, 2),
    ),
}
CONV_TOWERS = ["resnet", "convnext"]


def llm_config(llm="llama", **kwargs):
    name, _, tied = llm.partition("-")
    return LLM_CONFIGS[name](**{**_TEXT, "tie_word_embeddings": bool(tied), **kwargs})


def tower_config(tower="clip"):
    return TOWERS[tower][0]()


def tiny_config(llm="llama", tower="clip", **config):
    config = {"image_token_index": IMAGE_BEYOND, **TOWERS[tower][1], **config}
    return VWLmmConfig(vision_config=tower_config(tower), text_config=llm_config(llm), **config)


def randomize(model, seed=0):
    """Weights large enough to tell one computation from another; no bias is 0 and no gain is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


def tiny_model(llm="llama", tower="clip", **config):
    torch.manual_seed(0)
    return randomize(VWLmmForCausalLM(tiny_config(llm, tower, **config)))


def tiny_batch(config, rows=ROWS, padding="right", seed=0):
    """A batch with its placeholders expanded. The first text token of a row is not labelled, as a prompt is not."""
    generator = torch.Generator().manual_seed(seed)
    patches, image_token_id = config.image_seq_length, config.image_token_id
    token_rows = [
        torch.cat(
            [
                torch.full((patches,), image_token_id)
                if part == IMAGE
                else torch.randint(3, IMAGE_WITHIN, (part,), generator=generator)
                for part in row
            ]
        )
        for row in rows
    ]
    shape = len(rows), max(map(len, token_rows))
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    for i, tokens in enumerate(token_rows):
        place = slice(0, len(tokens)) if padding == "right" else slice(shape[1] - len(tokens), None)
        batch["input_ids"][i, place] = tokens
        batch["attention_mask"][i, place] = 1
    text = batch["attention_mask"].bool() & (batch["input_ids"] != image_token_id)
    text &= text.cumsum(1) > 1
    batch["labels"] = batch["input_ids"].masked_fill(~text, -100)
    images = sum(row.count(IMAGE) for row in rows)
    if images:
        batch["pixel_values"] = torch.randn(images, 3, *config.image_size, generator=generator)
    return batch


def without_labels(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def rows_of(config, batch):
    """The rows of a batch, a batch of one each, without their padding."""
    images = (batch["input_ids"] == config.image_token_id).sum(1) // config.image_seq_length
    pixel_values = batch["pixel_values"].split(images.tolist()) if "pixel_values" in batch else [None] * len(images)
    for i, keep in enumerate(batch["attention_mask"].bool()):
        row = {name: batch[name][i : i + 1, keep] for name in ("input_ids", "attention_mask", "labels")}
        yield {**row, "pixel_values": pixel_values[i]} if images[i] else row


def gradients(loss, model):
    """Gradient of every parameter, zeros where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))
