"""What is saved loads again, what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from helpers.cases import saved
from helpers.tiny import (
    IMAGE_BEYOND,
    IMAGE_FAR_BEYOND,
    IMAGE_WITHIN,
    LLMS,
    TOWERS,
    VOCAB_SIZE,
    llm_config,
    tiny_batch,
    tiny_config,
    tiny_model,
    tower_config,
    without_labels,
)
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM, VWLmmModel


@pytest.mark.parametrize("llm,tower", [(llm, "clip") for llm in LLMS] + [("llama", tower) for tower in TOWERS])
def test_save_and_load(llm, tower, tmp_path):
    settings = {
        "visual_word_loss_weight": 0.25,
        "visual_word_target": "language_model",
        "detach_visual_words": True,
        "visual_vocab_size": 91,
        "pseudo_image_features": True,
        "image_aspect_ratio": "crop",
    }
    model = tiny_model(llm, tower, **settings)
    with torch.no_grad():
        model.model.vm_head.weight[3, 5] = 123.456
    loaded = VWLmmForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.model.vm_head.weight[3, 5] == torch.tensor(123.456)
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == llm.endswith("-tied")
    batch = tiny_batch(model.config)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    for name, value in {**settings, **TOWERS[tower][1], "image_token_id": IMAGE_BEYOND}.items():
        assert getattr(loaded.config, name) == value


@pytest.mark.parametrize("llm", ["llama", "llama-tied"])
def test_names_of_the_saved_weights(llm, tmp_path):
    model = tiny_model(llm)
    names = set(load_file(saved(model, tmp_path) / "model.safetensors"))
    assert names == set(model.state_dict()) - ({"lm_head.weight"} if llm.endswith("-tied") else set())
    assert {name for name in names if not name.startswith(("model.vision_tower.", "model.language_model."))} == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.bias",
        "model.multi_modal_projector.linear_2.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vm_head.weight",
    } | (set() if llm.endswith("-tied") else {"lm_head.weight"})
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} <= names
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in names
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in names


def test_save_and_load_shards_in_bfloat16(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = VWLmmForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("model.vm_head.weight", lambda tensor: None, r"missing: model\.vm_head\.weight"),
        ("lm_head.weight", lambda tensor: None, r"missing: lm_head\.weight"),
        ("model.vm_tail.weight", lambda tensor: torch.ones(2), r"unexpected: model\.vm_tail\.weight"),
        (
            "model.vm_head.weight",
            lambda tensor: tensor[:50].clone(),
            r"model\.vm_head\.weight \(50, 16\) instead of \(99, 16\)",
        ),
    ],
    ids=["vm_head missing", "lm_head missing", "unexpected", "shape"],
)
def test_a_checkpoint_that_does_not_fit(name, change, message, tmp_path):
    path = saved(tiny_model(), tmp_path) / "model.safetensors"
    weights = load_file(path)
    changed = change(weights.pop(name, None))
    save_file(weights if changed is None else {**weights, name: changed}, path, metadata={"format": "pt"})
    for auto_class in (VWLmmForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(tmp_path)


def test_who_asks_for_a_new_part_gets_it(tmp_path):
    """The model without a head, loaded with one, and whoever wants to be told what is missing."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path / "base")
    loaded = VWLmmForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model.vm_head.weight, model.model.vm_head.weight)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    del weights["vm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.vm_head\.weight$"):
        VWLmmForCausalLM.from_pretrained(tmp_path / "base")
    _, info = VWLmmForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"model.vm_head.weight", "lm_head.weight"}


@pytest.mark.parametrize("model_type", ["llava", "llama"])
def test_a_checkpoint_of_another_type(model_type, tmp_path):
    if model_type == "llava":
        config = LlavaConfig(vision_config=tower_config(), text_config=llm_config(), image_token_index=IMAGE_WITHIN)
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    else:
        AutoModelForCausalLM.from_config(llm_config()).save_pretrained(tmp_path)
    message = {"llava": f"vwlmm convert {tmp_path} ", "llama": 'of type "vwlmm".* of type "llama"'}[model_type]
    for load in (VWLmmForCausalLM.from_pretrained, VWLmmConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_auto_classes(tmp_path):
    model = tiny_model()
    saved(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vwlmm"
    assert type(AutoConfig.from_pretrained(tmp_path)) is VWLmmConfig
    for auto_class, expected in [
        (AutoModel, VWLmmModel),
        (AutoModelForCausalLM, VWLmmForCausalLM),
        (AutoModelForImageTextToText, VWLmmForCausalLM),
        (AutoModelForMultimodalLM, VWLmmForCausalLM),
    ]:
        assert type(auto_class.from_config(model.config)) is expected
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is expected
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_model_without_a_head_leaves_the_head_out(tmp_path):
    model = tiny_model()
    loaded, info = VWLmmModel.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not info["unexpected_keys"] and loaded.state_dict().keys() == model.model.state_dict().keys()
    # vLLM would leave out of the whole model what is named here
    assert not loaded._keys_to_ignore_on_load_unexpected and not model._keys_to_ignore_on_load_unexpected


def test_an_empty_state_dict_asks_for_a_new_model():
    config = tiny_config()
    loaded = VWLmmForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="^the weights in the state_dict do not fit: missing: lm_head.weight, model"):
        VWLmmForCausalLM.from_pretrained(None, config=config, state_dict={"model.vm_head.weight": torch.zeros(99, 16)})


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(VOCAB_SIZE + 6, mean_resizing=False)
    loaded = VWLmmForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.config.visual_vocab_size == VOCAB_SIZE
    batch = tiny_batch(model.config)
    assert loaded(**batch).loss == model(**batch).loss


@pytest.mark.parametrize("image_token_index", [IMAGE_BEYOND, IMAGE_FAR_BEYOND])
def test_room_for_a_tokenizer_that_ends_with_the_image_token(image_token_index):
    """The LLM's logits stay what they were; other tokens between get rows, and placeholders are still known."""
    model = tiny_model(image_token_index=image_token_index)
    batch = without_labels(tiny_batch(model.config))
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(image_token_index + 1)
        after = model(**batch).logits
    assert after.shape[-1] == model.config.text_config.vocab_size == image_token_index
    assert torch.equal(after[..., :VOCAB_SIZE], before)
    model.get_input_embeddings()(batch["input_ids"])
    model.resize_token_embeddings(image_token_index + 3)  # tokens that were added after it
    assert model.lm_head.weight.shape[0] == image_token_index + 3
