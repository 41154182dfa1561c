"""Checkpoints in the published layout compute what the published code does."""

import copy

import datasets
import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_STD

from helpers.conversations import IMAGES, picture
from helpers.conversion import convert
from helpers.published import IMAGE, PUBLISHED, VARIANTS, expand, expected, reference, write_published
from helpers.training import sft_config
from modeling_vwlmm.conversion.published import published_name
from modeling_vwlmm.trainer import VWLmmSFTTrainer


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A variant's name, its model and processor, the published figures and tensors."""
    source = PUBLISHED / request.param
    destination = tmp_path_factory.mktemp("converted") / request.param
    model, processor = convert("--vision-tower", source / "vision_tower", source / "checkpoint", destination)
    return request.param, model, processor, *expected(request.param)


@pytest.mark.parametrize("batch", ["batch", "single"])
def test_published_models_compute_what_the_published_code_does(published, batch):
    _, model, _, figures, tensors = published
    rows = slice(None) if batch == "batch" else slice(1)
    images = int((tensors["input_ids"][rows] == IMAGE).sum())
    inputs = {
        "input_ids": expand(tensors["input_ids"][rows].tolist(), model.config),
        "attention_mask": tensors[f"{batch}.expanded_attention_mask"].long(),
        "labels": tensors[f"{batch}.expanded_labels"],
        "pixel_values": tensors["pixel_values"][:images],
    }
    expanded = expand(
        tensors["labels"][rows].masked_fill(tensors["input_ids"][rows] == IMAGE, IMAGE), model.config, -100
    )
    expanded = expanded.masked_fill(expanded == model.config.image_token_id, -100)
    assert torch.equal(expanded[:, : inputs["labels"].shape[1]], inputs["labels"])
    model.zero_grad()
    read = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    out = model(**inputs)
    hook.remove()
    image_mask = tensors[f"{batch}.image_mask"].bool()
    assert torch.equal(inputs["input_ids"] == model.config.image_token_id, image_mask)
    is_read = inputs["attention_mask"].bool()
    logits = tensors[f"{batch}.logits"]
    assert (out.logits - logits)[is_read].abs().max() <= 1e-4 * logits[is_read].abs().max()
    for name, figure in (("loss", out.loss), ("lm_loss", out.lm_loss), ("vw_loss_stage4", out.vw_loss)):
        assert figure.item() == pytest.approx(figures[batch][name], rel=1e-5)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = [name.removeprefix(f"{batch}.grad.") for name in tensors if name.startswith(f"{batch}.grad.")]
    assert len(names) == 7
    for name in names:
        wanted = tensors[f"{batch}.grad.{name}"]
        assert (gradients[published_name(name)] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name

    model.config.visual_word_target = "language_model"
    with torch.no_grad():
        assert model(**inputs).vw_loss.item() == pytest.approx(figures[batch]["vw_loss_stage3"], rel=1e-5)
        hidden = model.model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        words = model.visual_words(inputs["pixel_values"]).flatten(0, 1)
        _, positions = model.visual_word_loss(hidden, image_mask, inputs["attention_mask"])
    model.config.visual_word_target = "visual_words"
    assert positions == figures[batch]["visual_positions_scored"]
    torch.testing.assert_close(words, tensors[f"{batch}.visual_words"][image_mask], rtol=1e-4, atol=1e-7)
    wanted = tensors[f"{batch}.inputs_embeds"]
    torch.testing.assert_close(read[0][is_read], wanted[is_read], rtol=1e-4, atol=1e-6)


def test_published_models_continue_as_published(published):
    _, model, _, figures, tensors = published
    prompt, wanted = figures["greedy"]["prompt_ids"], figures["greedy"]["new_ids"]
    input_ids = expand([prompt], model.config)
    found = model.generate(
        input_ids,
        pixel_values=tensors["pixel_values"][:1],
        do_sample=False,
        max_new_tokens=len(wanted),
        eos_token_id=-1,
    )
    assert found[0, input_ids.shape[1] :].tolist() == wanted


def test_published_tokenizers_and_prompts(published):
    variant, model, processor, figures, _ = published
    for case in figures["tokenizer"]:
        assert processor.tokenizer(case["text"]).input_ids == case["ids"]
    for case in figures["prompts"]:
        rendered = processor.apply_chat_template(case["messages"], add_generation_prompt=True)
        assert rendered == case["rendered"]
        images = [torch.zeros(3, 56, 56, dtype=torch.uint8)] * rendered.count("<image>")
        ids = processor(images=images or None, text=rendered)["input_ids"]
        assert ids[0] == expand([case["ids"]], model.config)[0].tolist()


def test_published_preprocessing(published):
    _, _, processor, _, tensors = published
    square = processor.image_processor(list(tensors["images_uint8"].permute(0, 3, 1, 2)), return_tensors="pt")
    images = [tensors[f"preprocess.{kind}_uint8"].permute(2, 0, 1) for kind in ("wide", "tall")]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    grey_level = 1 / 255 / torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    assert ((pixel_values - tensors["preprocess.pixel_values"]).abs() <= 1.001 * grey_level).all()
    assert ((square["pixel_values"] - tensors["pixel_values"]).abs() <= 1.001 * grey_level).all()


CHECKPOINTS = {
    "llama": {},
    "llama, wider": {"hidden": 48, "heads": 6, "kv_heads": 6, "width": 32, "image_size": 56, "seed": 1},
    "mistral, one kv head": {"architecture": "vwMistralForCausalLM", "kv_heads": 1, "shards": 3, "seed": 2},
    "pif": {"architecture": "vwPifLlamaForCausalLM", "shards": 2, "suffix": "bin", "seed": 3},
    "one bin": {"suffix": "bin", "layers": 1, "image_size": 42, "seed": 4},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_other_checkpoints_in_the_published_layout(tmp_path, case):
    tensors = write_published(tmp_path / "source", **CHECKPOINTS[case])
    model, _ = convert(tmp_path / "source", tmp_path / "ours")
    patches = model.config.image_seq_length
    input_ids = torch.randint(3, 300, (2, 9 + patches))
    input_ids[0, 2 : 2 + patches] = input_ids[1, :patches] = IMAGE
    labels = input_ids.masked_fill(input_ids == IMAGE, -100)
    pixel_values = torch.randn(2, 3, *model.config.image_size)
    wanted = reference(tmp_path / "source", tensors, input_ids, pixel_values, labels)
    ids = input_ids.masked_fill(input_ids == IMAGE, model.config.image_token_id)
    for target in ("visual_words", "language_model"):
        model.config.visual_word_target = target
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixel_values, labels=labels)
        assert (out.logits - wanted["logits"]).abs().max() <= 1e-4 * wanted["logits"].abs().max()
        assert out.lm_loss.item() == pytest.approx(wanted["lm_loss"].item(), rel=1e-5)
        assert out.vw_loss.item() == pytest.approx(wanted[target].item(), rel=1e-5)


def test_a_converted_model_trains(published, tmp_path):
    """Its template is rendered, its answers are found, and the visual-word loss is in."""
    _, model, processor, *_ = published
    model = copy.deepcopy(model)
    messages = [
        {"role": "user", "content": "What is\\nthis?"},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    data = datasets.Dataset.from_list([{"images": [picture(0)], "messages": messages}] * 2)
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, max_steps=1),
        train_dataset=data.cast_column("images", IMAGES),
        processing_class=processor,
    )
    (labels,) = {tuple(row[row >= 0].tolist()) for row in next(iter(trainer.get_train_dataloader()))["labels"]}
    answers = processor.tokenizer.decode(labels)
    assert answers.split("</s>")[:2] == ["A red circle.", "Yes."]
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0
