import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from tiny import (
    CONV_TOWERS,
    IMAGE,
    IMAGE_BEYOND,
    IMAGE_FAR_BEYOND,
    IMAGE_WITHIN,
    LLMS,
    ROWS,
    TEXT_ROWS,
    TOWERS,
    VOCAB_SIZE,
    gradients,
    llm_config,
    randomize,
    rows_of,
    tiny_batch,
    tiny_config,
    tiny_model,
    tower_config,
    without_labels,
)
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
)

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM, VWLmmModel


IMAGE_TOKENS = pytest.mark.parametrize("image_token_index", [IMAGE_BEYOND, IMAGE_WITHIN], ids=["beyond", "within"])
PADDING = pytest.mark.parametrize("padding", ["right", "left"])
PSEUDO = pytest.mark.parametrize("pseudo", [False, True], ids=["features", "pseudo"])


class Calls:
    """Counts the calls of a module, with the length of the sequence in each."""

    def __init__(self, module):
        self.lengths = []
        module.register_forward_hook(lambda module, args, output: self.lengths.append(output.shape[-2]))


# Every pairing of LLM and tower


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_forward(llm, tower):
    model = tiny_model(llm, tower, visual_word_loss_weight=0.5)
    batch = tiny_batch(model.config)
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, VOCAB_SIZE)
    assert out.lm_loss.isfinite() and out.vw_loss.isfinite() and out.vw_loss > 0
    assert_close(out.loss, out.lm_loss + 0.5 * out.vw_loss, rtol=1e-6, atol=0)
    height, width = TOWERS[tower][2]
    images = len(batch["pixel_values"])
    assert model.config.image_seq_length == height * width
    assert out.image_hidden_states.shape == (images, height * width, model.config.text_config.hidden_size)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == llm.endswith("-tied")


@pytest.mark.parametrize("tower", CONV_TOWERS)
def test_cells_of_a_feature_map_are_patches_row_by_row(tower):
    model = tiny_model(tower=tower)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    feature_map = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    height, width = TOWERS[tower][2]
    assert feature_map.shape[-2:] == (height, width) and height != width
    features = model.model.get_image_features(pixel_values).pooler_output
    for row in range(height):
        for column in range(width):
            expected = model.model.multi_modal_projector(feature_map[:, :, row, column])
            assert_close(features[:, row * width + column], expected)


def test_several_vision_feature_layers():
    model = tiny_model(tower="clip", vision_feature_layer=[0, -1], vision_feature_select_strategy="full")
    pixel_values = tiny_batch(model.config)["pixel_values"]
    hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = torch.cat([hidden_states[0], hidden_states[-1]], dim=-1)
    found = model.model.get_image_features(pixel_values).pooler_output
    assert_close(found, model.model.multi_modal_projector(features))
    assert found.shape[1] == model.config.image_seq_length == 5


# The same text model as transformers'


@pytest.mark.parametrize("llm", LLMS)
def test_text_equals_stock_llava(llm):
    model = tiny_model(llm, image_token_index=IMAGE_WITHIN, visual_word_loss_weight=0.0)
    config = model.config
    stock = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower_config(), text_config=llm_config(llm), image_token_index=IMAGE_WITHIN)
    ).eval()
    weights = model.state_dict()
    del weights["model.vm_head.weight"]
    stock.load_state_dict(weights)
    for padding in ("right", "left"):
        batch = tiny_batch(config, padding=padding)
        out, expected = model(**batch), stock(**batch)
        assert_close(out.logits, expected.logits, rtol=1e-6, atol=1e-6)
        assert_close(out.lm_loss, expected.loss, rtol=1e-6, atol=0)
        assert out.loss == out.lm_loss
        found = gradients(out.loss, model)
        assert not found.pop("model.vm_head.weight").any()
        assert_close(found, gradients(expected.loss, stock), rtol=1e-5, atol=1e-6)


@IMAGE_TOKENS
@pytest.mark.parametrize("llm", LLMS)
def test_text_equals_the_llm_alone(llm, image_token_index):
    model = tiny_model(llm, image_token_index=image_token_index)
    alone = AutoModelForCausalLM.from_config(llm_config(llm)).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    batch = tiny_batch(model.config, TEXT_ROWS)
    out, expected = model(**batch), alone(**batch)
    assert torch.equal(out.logits, expected.logits)
    assert out.loss == out.lm_loss == expected.loss and out.vw_loss is None
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE


@PSEUDO
def test_the_image_token_makes_no_difference(pseudo):
    found = []
    for image_token_index in (IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND):
        model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
        found.append(model(**tiny_batch(model.config)))
    for other in found[1:]:
        assert torch.equal(found[0].logits, other.logits)
        assert found[0].lm_loss == other.lm_loss and found[0].vw_loss == other.vw_loss


# Batches


@PSEUDO
@PADDING
@pytest.mark.parametrize("tower", ["clip", "siglip", "resnet"])
def test_batched_equals_single(tower, padding, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    rows = (*ROWS, (4, IMAGE, IMAGE, IMAGE, 2), (9,))
    batch = tiny_batch(model.config, rows, padding=padding)
    out = model(**batch)
    lm_loss = vw_loss = tokens = positions = 0
    for i, row in enumerate(rows_of(model.config, batch)):
        single = model(**row)
        assert_close(out.logits[i][batch["attention_mask"][i].bool()], single.logits[0], rtol=1e-5, atol=1e-5)
        row_tokens = (row["labels"][:, 1:] != -100).sum()
        row_positions = (row["input_ids"][:, 1:] == model.config.image_token_id).sum()
        lm_loss, tokens = lm_loss + single.lm_loss * row_tokens, tokens + row_tokens
        if row_positions:
            vw_loss, positions = vw_loss + single.vw_loss * row_positions, positions + row_positions
        else:
            assert single.vw_loss is None
    assert_close(out.lm_loss, lm_loss / tokens, rtol=1e-5, atol=1e-5)
    assert_close(out.vw_loss, vw_loss / positions, rtol=1e-5, atol=1e-5)


# Generation


def greedy(model, inputs, steps, penalty=1.0):
    """Greedy decoding that computes everything anew for every token; the logits of each step and the tokens."""
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    step_logits = []
    for _ in range(steps):
        inputs = {**inputs, "input_ids": input_ids, "attention_mask": attention_mask}
        logits = model(**inputs, use_cache=False).logits[:, -1].clone()
        step_logits.append(logits.clone())
        for i, row in enumerate(input_ids):
            for token in set(row[attention_mask[i].bool()].tolist()) - {model.config.image_token_id}:
                logits[i, token] *= 1 / penalty if logits[i, token] > 0 else penalty
        tokens = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens)], dim=1)
    return torch.stack(step_logits), input_ids


@PSEUDO
@IMAGE_TOKENS
@torch.no_grad()
def test_generation_with_a_cache_equals_recomputation(image_token_index, pseudo):
    model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    step_logits, expected = greedy(model, inputs, 8)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    assert_close(torch.stack(out.logits), step_logits, rtol=1e-4, atol=1e-5)
    chunked = model.generate(**inputs, max_new_tokens=8, do_sample=False, prefill_chunk_size=3)
    assert chunked.tolist() == expected.tolist()


@pytest.mark.parametrize("llm", LLMS)
@torch.no_grad()
def test_generation_of_every_llm(llm):
    model = tiny_model(llm)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert found.tolist() == greedy(model, inputs, 4)[1].tolist()


@PSEUDO
@torch.no_grad()
def test_the_vm_head_runs_in_the_prefill_and_only_for_pseudo_image_features(pseudo):
    model = tiny_model(pseudo_image_features=pseudo)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    vm_head, lm_head = Calls(model.model.vm_head), Calls(model.lm_head)
    projector = Calls(model.model.multi_modal_projector)
    model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert lm_head.lengths == [1] * 5
    assert projector.lengths == [model.config.image_seq_length]
    assert vm_head.lengths == ([model.config.image_seq_length] if pseudo else [])


@pytest.mark.parametrize("image_token_index", [IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND])
@torch.no_grad()
def test_repetition_penalty_counts_text_tokens_alone(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    expected = greedy(model, inputs, 8, penalty=1.7)[1]
    assert expected.tolist() != greedy(model, inputs, 8)[1].tolist()
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)
    assert found.tolist() == expected.tolist()


def bigrams(tokens):
    return list(zip(tokens, tokens[1:], strict=False))


@pytest.mark.parametrize("image_token_index", [IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND])
@torch.no_grad()
def test_no_repeat_ngram_size(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 4)]))
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, 2]  # which a placeholder follows in the prompt
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, length:].tolist()
    assert len(set(bigrams(free))) < 19
    found = model.generate(**inputs, max_new_tokens=20, do_sample=False, no_repeat_ngram_size=2)[0, length:].tolist()
    assert len(set(bigrams(found))) == 19


@torch.no_grad()
def test_no_repeat_ngram_size_sees_no_ngram_in_placeholders():
    model = tiny_model()
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 2)]))
    text = inputs["input_ids"][inputs["input_ids"] != IMAGE_BEYOND].tolist()
    processors = model._get_logits_processor(GenerationConfig(no_repeat_ngram_size=2), input_ids_seq_length=9)
    for last in range(3, 90):
        input_ids = torch.cat([inputs["input_ids"], torch.tensor([[last]])], dim=1)
        banned = processors(input_ids, torch.zeros(1, VOCAB_SIZE))[0].isinf().nonzero().flatten().tolist()
        after = [b for a, b in bigrams(text[:3]) + bigrams([*text[3:], last]) if a == last]
        assert banned == sorted(after)


@PSEUDO
@torch.no_grad()
def test_beams_and_returned_sequences(pseudo):
    model = tiny_model(pseudo_image_features=pseudo)
    batch = tiny_batch(model.config, padding="left")
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
    }
    found = model.generate(**without_labels(batch), **settings)
    assert len(found) == 2 * len(ROWS)
    for i, row in enumerate(rows_of(model.config, batch)):
        expected = model.generate(**without_labels(row), **settings)
        assert found[2 * i : 2 * i + 2, -6:].tolist() == expected[:, -6:].tolist()
        assert expected[0].tolist() != expected[1].tolist()


@torch.no_grad()
def test_sampling():
    model = tiny_model()
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    found = model.generate(
        **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=20, top_p=0.9, min_p=0.01
    )
    assert found.shape == (3 * len(ROWS), inputs["input_ids"].shape[1] + 4)
    assert found[:, -4:].max() < VOCAB_SIZE


# Pseudo image features


@pytest.mark.parametrize("visual_vocab_size", [VOCAB_SIZE, 77])
def test_pseudo_image_features(visual_vocab_size):
    model = tiny_model(pseudo_image_features=True, visual_vocab_size=visual_vocab_size)
    batch = tiny_batch(model.config)
    read = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    out = model(**batch)
    words, embeddings = model.visual_words(batch["pixel_values"]), model.get_input_embeddings().weight
    expected = torch.zeros_like(out.image_hidden_states)
    for v in range(visual_vocab_size):
        expected += words[..., v, None] * embeddings[v]
    is_image = batch["input_ids"] == IMAGE_BEYOND
    assert_close(read[0][is_image], expected.flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(read[0][~is_image], embeddings[batch["input_ids"][~is_image]])
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output
    assert torch.equal(out.image_hidden_states, features)


@PSEUDO
def test_the_text_loss_reaches_the_vm_head_through_pseudo_image_features(pseudo):
    model = tiny_model(pseudo_image_features=pseudo, visual_word_loss_weight=0.0)
    found = gradients(model(**tiny_batch(model.config)).loss, model)
    assert found["model.vm_head.weight"].any() == pseudo
    assert found["model.multi_modal_projector.linear_1.weight"].any()


# Saving and loading


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


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
    ]:
        assert type(auto_class.from_config(model.config)) is expected
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is expected
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_the_import_is_light():
    code = "import sys, modeling_vwlmm; print([name for name in ('trl', 'peft') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# The vocabulary of the visual words


@PSEUDO
@pytest.mark.parametrize("llm", ["llama", "llama-tied"])
def test_tokens_added_later_change_no_visual_word(llm, pseudo):
    model = tiny_model(llm, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    words, out = model.visual_words(batch["pixel_values"]), model(**batch)
    model.resize_token_embeddings(VOCAB_SIZE + 6, mean_resizing=False)
    assert model.lm_head.weight.shape[0] == VOCAB_SIZE + 6
    resized_words, resized = model.visual_words(batch["pixel_values"]), model(**batch)
    assert torch.equal(words, resized_words) and words.shape[-1] == VOCAB_SIZE
    assert_close(resized.vw_loss, out.vw_loss, rtol=1e-6, atol=0)
    assert_close(resized.logits[..., :VOCAB_SIZE], out.logits, rtol=1e-5, atol=1e-6)
    assert resized.logits.shape[-1] == VOCAB_SIZE + 6 and resized.lm_loss > out.lm_loss


def test_a_resized_model_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(VOCAB_SIZE + 6, mean_resizing=False)
    loaded = VWLmmForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.config.visual_vocab_size == VOCAB_SIZE
    batch = tiny_batch(model.config)
    assert loaded(**batch).loss == model(**batch).loss


def test_a_smaller_visual_vocabulary():
    model = tiny_model(visual_vocab_size=77)
    batch = tiny_batch(model.config, [(3, IMAGE, 2)])
    out, words = model(**batch), model.visual_words(batch["pixel_values"])
    assert words.shape == (1, 4, 77) and out.logits.shape[-1] == VOCAB_SIZE
    p = out.logits[0, 2:6, :77].softmax(-1)
    assert_close(out.vw_loss, (words[0] * (words[0] / p).log()).sum() / 4, rtol=1e-5, atol=0)


# What is promised, and what is refused


@IMAGE_TOKENS
def test_visual_words(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    words = model.visual_words(pixel_values)
    assert words.shape == (len(pixel_values), 4, VOCAB_SIZE) and words.dtype == torch.float32
    assert_close(words.sum(-1), torch.ones(len(pixel_values), 4))
    features = model.model.get_image_features(pixel_values).pooler_output
    expected = (features @ model.model.vm_head.weight.T).exp()
    assert_close(words, expected / expected.sum(-1, keepdim=True))


def test_losses_are_there_where_they_should_be():
    model = tiny_model()
    batch = tiny_batch(model.config)
    out = model(**without_labels(batch))
    assert out.loss is None and out.lm_loss is None and out.vw_loss is None
    out = model(**batch)
    assert all(out[name] is not None for name in ("loss", "lm_loss", "vw_loss", "logits"))
    out_tuple = model(**batch, return_dict=False)
    assert isinstance(out_tuple, tuple) and torch.equal(out_tuple[0], out.loss)
    out = model(**tiny_batch(model.config, TEXT_ROWS))
    assert out.vw_loss is None and torch.equal(out.loss, out.lm_loss)
    model.config.visual_word_loss_weight = 0.0
    vm_head = Calls(model.model.vm_head)
    out = model(**batch)
    assert out.vw_loss is None and torch.equal(out.loss, out.lm_loss) and not vm_head.lengths


def test_the_weight_scales_the_gradients_of_the_visual_word_loss():
    found = {}
    for weight in (0.0, 1.0, 3.0):
        model = tiny_model(visual_word_loss_weight=weight)
        found[weight] = gradients(model(**tiny_batch(model.config)).loss, model)
    for name, at_0 in found[0.0].items():
        assert_close(found[3.0][name] - at_0, 3 * (found[1.0][name] - at_0), rtol=1e-4, atol=1e-5)
    assert (found[1.0]["lm_head.weight"] - found[0.0]["lm_head.weight"]).abs().max() > 1e-3


@IMAGE_TOKENS
@pytest.mark.parametrize("images,message", [(3, "16 .*3 .*12"), (5, "16 .*5 .*20"), (None, "16 .*0 .*0")])
def test_placeholders_that_do_not_match_the_images(images, message, image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    batch = tiny_batch(model.config)
    pixel_values = batch.pop("pixel_values")
    if images is not None:
        batch["pixel_values"] = pixel_values.repeat(2, 1, 1, 1)[:images]
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_images_without_placeholders():
    model = tiny_model()
    batch = tiny_batch(model.config, TEXT_ROWS)
    with pytest.raises(ValueError, match="0 .*2 .*8"):
        model(**batch, pixel_values=torch.zeros(2, 3, 16, 16))


def test_inputs_embeds():
    model = tiny_model()
    batch = tiny_batch(model.config, TEXT_ROWS)
    expected = model(**batch)
    input_ids = batch.pop("input_ids")
    inputs_embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(**batch, inputs_embeds=inputs_embeds).loss, expected.loss)
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=inputs_embeds, pixel_values=torch.zeros(1, 3, 16, 16))
    for both in ({}, {"input_ids": input_ids, "inputs_embeds": inputs_embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**both)


@pytest.mark.parametrize(
    "config,message",
    [
        ({"visual_vocab_size": VOCAB_SIZE + 1}, "visual_vocab_size is 100, .* 99"),
        ({"visual_vocab_size": 0}, "visual_vocab_size is 0"),
        ({"visual_word_loss_weight": -1.0}, "visual_word_loss_weight is -1"),
        ({"visual_word_target": "image"}, "visual_word_target"),
        ({"image_aspect_ratio": "stretch"}, "image_aspect_ratio"),
        ({"vision_config": ResNetConfig(hidden_sizes=[8], depths=[1])}, 'type "resnet" has no image_size'),
    ],
)
def test_config_errors(config, message):
    config = {"vision_config": tower_config(), "text_config": llm_config(), **config}
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        VWLmmConfig(**config)


def test_config_defaults():
    config = VWLmmConfig(vision_config=tower_config(), text_config=llm_config())
    assert config.visual_vocab_size == VOCAB_SIZE and config.image_seq_length == 4
    assert config.visual_word_loss_weight == 1.0 and config.visual_word_target == "visual_words"
    assert not config.detach_visual_words and not config.pseudo_image_features
    assert config.image_token_id == config.image_token_index and config.image_aspect_ratio == "pad"
    assert tiny_config(image_seq_length=7).image_seq_length == 7
    assert VWLmmConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Training


def statistics(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def test_a_frozen_tower_stays_in_eval_mode():
    model = tiny_model(tower="resnet")
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training and model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    before, words = statistics(model), model.visual_words(tiny_batch(model.config)["pixel_values"])
    model(**tiny_batch(model.config)).loss.backward()
    assert before and all(map(torch.equal, before, statistics(model)))
    assert torch.equal(words, model.visual_words(tiny_batch(model.config)["pixel_values"]))


def test_an_unfrozen_tower_trains():
    model = tiny_model(tower="resnet").train()
    assert all(module.training for module in model.modules())
    before = statistics(model)
    model(**tiny_batch(model.config)).loss.backward()
    assert not any(map(torch.equal, before, statistics(model)))
    assert model.model.vision_tower.embedder.embedder.convolution.weight.grad.any()
    assert not any(module.training for module in model.eval().modules())


@PSEUDO
@pytest.mark.parametrize("trained", [("projector", "tower"), ("projector",), ("vm_head",)], ids="+".join)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_batch_of_text_alone_trains_nothing_but_backpropagates(tower, trained, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    parts = {
        "projector": model.model.multi_modal_projector,
        "tower": model.model.vision_tower,
        "vm_head": model.model.vm_head,
    }
    model.requires_grad_(False)
    for part in trained:
        parts[part].requires_grad_(True)
    model.train()
    before, batch = statistics(model), tiny_batch(model.config, TEXT_ROWS)
    out = model(**batch)
    assert out.vw_loss is None
    out.loss.backward()
    for name, part in parts.items():
        grads = [parameter.grad for parameter in part.parameters()]
        unused = name == "tower"  # a layer beyond the one that is read
        assert (any if unused else all)(grad is not None for grad in grads) == (name in trained)
        assert not any(grad is not None and grad.count_nonzero() for grad in grads)
    assert all(map(torch.equal, before, statistics(model)))
    assert model.model.vision_tower.training == ("tower" in trained)
    assert_close(out.loss, model.eval()(**batch).loss)


def test_a_batch_of_text_alone_among_processes_that_train_together(monkeypatch):
    model = tiny_model().train()
    batch = tiny_batch(model.config, TEXT_ROWS)
    model(**batch).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model(**batch).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.vm_head, model.model.vision_tower.embeddings):
        assert all(not parameter.grad.any() for parameter in part.parameters())


def test_a_batch_of_text_alone_with_a_tower_of_one_channel():
    tower = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], image_size=16)
    config = VWLmmConfig(
        vision_config=tower, text_config=llm_config(), image_token_index=IMAGE_BEYOND, vision_feature_layer=-1
    )
    model = randomize(VWLmmForCausalLM(config)).train()
    model.model.language_model.requires_grad_(False)
    model(**tiny_batch(config, TEXT_ROWS)).loss.backward()
    assert not model.model.multi_modal_projector.linear_1.weight.grad.any()


@PSEUDO
def test_gradient_checkpointing(pseudo):
    model = tiny_model(pseudo_image_features=pseudo).train()
    batch = tiny_batch(model.config)
    expected = gradients(model(**batch).loss, model)
    model.activation_checkpointing_enable()
    norm = Calls(model.model.language_model.layers[0].input_layernorm)
    out = model(**batch)
    assert len(norm.lengths) == 1
    assert_close(gradients(out.loss, model), expected, rtol=1e-6, atol=1e-6)
    assert len(norm.lengths) == 2  # computed anew


@PSEUDO
@pytest.mark.parametrize("tower", TOWERS)
def test_bfloat16(tower, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    expected = model(**batch)
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert out.vw_loss.dtype == out.loss.dtype == torch.float32
    assert_close(out.loss, expected.loss, rtol=0.1, atol=0)
    assert model.visual_words(batch["pixel_values"]).dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(out.loss, model).values())


def test_llms_whose_head_is_not_a_linear_map_are_refused():
    with pytest.raises(ValueError, match="text_config has final_logit_softcapping"):
        VWLmmConfig(
            vision_config=tower_config(),
            text_config=Gemma2Config(vocab_size=99, num_hidden_layers=1),
            image_token_index=99,
        )


def test_placeholders_are_no_labels():
    model = tiny_model()
    batch = tiny_batch(model.config)
    expected = model(**batch).lm_loss
    is_image = batch["input_ids"] == model.config.image_token_id
    batch["labels"] = torch.where(is_image, batch["input_ids"], batch["labels"])
    assert torch.equal(model(**batch).lm_loss, expected)


@pytest.mark.parametrize("tower", ["clip", "resnet"])
def test_float32_images_go_into_a_bfloat16_model(tower):
    model = tiny_model(tower=tower).to(torch.bfloat16)
    batch = tiny_batch(model.config)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.isfinite(model(**batch).logits).all()
    assert torch.isfinite(model.visual_words(batch["pixel_values"])).all()
