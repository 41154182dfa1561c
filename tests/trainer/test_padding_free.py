"""Samples that lie one after another train as those that are padded, whatever attends to them."""

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AttentionInterface

from helpers.conversations import conversations, tiny_processor
from helpers.reading import reading_processor, sample
from helpers.tiny import IMAGE, gradients, rows_of, tiny_batch, tiny_model, without_labels
from helpers.training import assert_same, batch_of, first_gradients, sft_config, trainer_of
from modeling_vwlmm.data.packing import lay_out
from modeling_vwlmm.naive import naive_visual_word_loss
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.trainer.sample_attention import SDPA_BY_SAMPLE


ALL = ["projector", "language_model", "vm_head"]
CASES = {
    "align": {"stage": "align"},
    "instruct": {"stage": "instruct", "max_length": 12},
    "visual_words": {"stage": "visual_words"},
    "joint": {"stage": "joint", "trainable": ["vision_tower", *ALL]},
    "lora": {"stage": "joint", "trainable": ALL, "lora": True, "activation_checkpointing": True},
    "pseudo": {"stage": "joint", "trainable": ALL, "model": {"pseudo_image_features": True}},
    "accumulated": {
        "stage": "joint",
        "assistant_only_loss": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "no-image": {"stage": "visual_words", "images": (0, 0, 0, 0)},
    "eager-mistral": {"stage": "joint", "model": {"llm": "mistral", "attention": "eager"}, "pad_to_multiple_of": 16},
    "qwen3-convnext": {"stage": "joint", "model": {"llm": "qwen3-tied", "tower": "convnext"}},
}


def step(tmp_path, model=None, lora=False, images=(1, 0, 2, 1), dataset=None, **settings):
    """The gradients of the first step, and its losses."""
    model = dict(model or {})
    attention = model.pop("attention", "sdpa")
    model = tiny_model(**model)
    model.set_attn_implementation({"text_config": attention})
    settings = {"activation_checkpointing": False, **settings}
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, max_grad_norm=0, **settings),
        train_dataset=conversations(images) if dataset is None else dataset,
        processing_class=tiny_processor(model.config),
        peft_config=LoraConfig(r=2, init_lora_weights=False) if lora else None,
    )
    found = first_gradients(trainer)
    return found, {name: trainer.state.log_history[0][name] for name in ("loss", "lm_loss", "vw_loss")}, trainer


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_losses_are_those_of_padded_training(tmp_path, case):
    expected, padded, _ = step(tmp_path, **CASES[case])
    found, laid_out, trainer = step(tmp_path, padding_free=True, **CASES[case])
    assert found and padded["lm_loss"] > 0 and laid_out == pytest.approx(padded, abs=1e-5, rel=1e-5)
    assert_same(found, expected, atol=1e-5, rtol=1e-5)
    assert trainer.args.padding_free and batch_of(trainer)["input_ids"].shape[0] == 1


def test_stage_read_reads_the_same_words(tmp_path):
    rows = [sample("owl bird"), sample("cow animal", images=2), sample("owl animal"), sample("bird", images=0)]

    def gradients_of(**settings):
        model = tiny_model()
        trainer = VWLmmSFTTrainer(
            model,
            sft_config(tmp_path, stage="read", max_grad_norm=0, **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=reading_processor(model.config),
        )
        return first_gradients(trainer)

    assert_same(gradients_of(padding_free=True), gradients_of(), atol=1e-5, rtol=1e-5)


def test_what_a_batch_holds(tmp_path):
    settings = {"assistant_only_loss": False, "train_sampling_strategy": "sequential"}
    padded = batch_of(trainer_of(tmp_path, **settings))
    batch = batch_of(trainer_of(tmp_path, padding_free=True, **settings))
    lengths = padded["attention_mask"].sum(1)
    kept = padded["attention_mask"].bool()
    assert "attention_mask" not in batch and torch.equal(batch["pixel_values"], padded["pixel_values"])
    assert torch.equal(batch["input_ids"], padded["input_ids"][kept][None])
    assert torch.equal(batch["position_ids"], torch.cat([torch.arange(n) for n in lengths])[None])
    first = batch["position_ids"] == 0
    assert torch.equal(batch["labels"], padded["labels"][kept][None].masked_fill(first, -100))
    assert batch["cu_seq_lens_q"].tolist() == [0, *lengths.cumsum(0).tolist()]
    assert batch["max_length_q"] == lengths.max()


def laid_out(config, rows=((3, IMAGE, 4), (IMAGE, 3), (6,), (2, IMAGE, 1, IMAGE, 2))):
    """A batch with all tokens labelled, also those that open a sample, padded and laid out."""
    batch = tiny_batch(config, rows)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    flat = lay_out(batch, pad_token_id=0)
    flat["labels"] = flat["input_ids"].clone()
    return batch, flat


def by_cumulative_lengths(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_k=None, **kwargs):
    """As flash-attention tells samples apart: without a mask or positions."""
    assert attention_mask is None and max_length_k == cu_seq_lens_q.diff().max()
    key, value = (tensor.repeat_interleave(module.num_key_value_groups, dim=1) for tensor in (key, value))
    outputs = []
    for start, end in zip(cu_seq_lens_q[:-1], cu_seq_lens_q[1:], strict=True):
        q, k, v = (tensor[0, :, start:end] for tensor in (query, key, value))
        later = torch.ones(end - start, end - start).triu(1).bool()
        scores = (q @ k.mT * module.scaling).masked_fill(later, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


AttentionInterface.register("by_cumulative_lengths", by_cumulative_lengths)


@pytest.mark.parametrize("attention", ["sdpa", "eager", SDPA_BY_SAMPLE, "by_cumulative_lengths"])
@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_neither_loss_crosses_from_one_sample_to_another(attention, target):
    """Against each sample by itself, with the naive loss."""
    model = tiny_model(visual_word_target=target)
    batch, flat = laid_out(model.config)
    lm_sum, vw_sum, tokens, positions = 0.0, 0.0, 0, 0
    for row in rows_of(model.config, batch):
        outputs = model.model(**without_labels(row))
        is_image, hidden_states = row["input_ids"][0] == model.config.image_token_id, outputs.last_hidden_state[0, :-1]
        opens, is_image = is_image[0], is_image[1:]
        labels = row["labels"][0, 1:].masked_fill(is_image, -100)
        lm_sum += torch.nn.functional.cross_entropy(model.lm_head(hidden_states), labels, reduction="sum")
        tokens += (labels != -100).sum()
        if is_image.any():
            features = outputs.image_hidden_states.flatten(0, 1)[int(opens) :]
            vw_sum += naive_visual_word_loss(
                hidden_states[is_image], model.lm_head.weight, features, model.model.vm_head.weight, target=target
            )
            positions += is_image.sum()
    expected = lm_sum / tokens + vw_sum / positions
    assert positions == 4 * model.config.image_seq_length - 1  # the image that opens a sample has one less
    model.set_attn_implementation({"text_config": attention})
    found = model(**flat)
    torch.testing.assert_close(found.lm_loss, lm_sum / tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.vw_loss, vw_sum / positions, atol=1e-5, rtol=1e-5)
    assert_same(gradients(found.loss, model), gradients(expected, model), atol=1e-5, rtol=1e-5)


def test_a_sliding_window_stays_within_its_sample():
    model = tiny_model("mistral")
    model.config.text_config.sliding_window = 3
    _, flat = laid_out(model.config)
    with torch.no_grad():
        expected = model(**flat).logits
        model.set_attn_implementation({"text_config": SDPA_BY_SAMPLE})
        torch.testing.assert_close(model(**flat).logits, expected, atol=1e-5, rtol=1e-5)
        model.config.text_config.sliding_window = None
        assert not torch.allclose(model(**flat).logits, expected, atol=1e-2)


def test_flex_attention_reads_each_sample_by_itself():
    """Forward: it has no backward pass on a CPU. Not compiled, which takes long."""
    model = tiny_model()
    _, flat = laid_out(model.config)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**flat)
        model.set_attn_implementation({"text_config": "flex_attention"})
        found = model(**flat)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_a_broken_image_takes_its_sample_out(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = conversations((1, 0, 1, 1))
    rows = [dict(row) for row in whole]
    rows[2]["images"] = [{"bytes": None, "path": str(tmp_path / "broken.png")}]
    broken = datasets.Dataset.from_list(rows, features=whole.features)
    expected, losses, _ = step(tmp_path, dataset=whole.select([0, 1, 3]))
    found, laid_out, trainer = step(tmp_path, dataset=broken, padding_free=True, skip_broken_images=True)
    assert_same(found, expected, atol=1e-5, rtol=1e-5)
    assert laid_out == pytest.approx(losses, rel=1e-5)
    assert trainer.state.log_history[0]["skipped_samples"] == 1
    nothing, _, _ = step(tmp_path, dataset=broken.select([2]), padding_free=True, skip_broken_images=True)
    assert all(not gradient.any() for gradient in nothing.values())


def test_text_alone_is_laid_out_too(tmp_path):
    dataset = conversations((0, 0, 0, 0)).remove_columns("images")
    expected, losses, _ = step(tmp_path, dataset=dataset)
    found, laid_out, _ = step(tmp_path, dataset=dataset, padding_free=True)
    assert_same(found, expected, atol=1e-5, rtol=1e-5)
    assert laid_out == pytest.approx(losses, rel=1e-5)


def test_evaluation_and_prediction(tmp_path):
    model = tiny_model()
    padded, laid_out = (
        trainer_of(tmp_path, model, padding_free=padding_free, per_device_eval_batch_size=2)
        for padding_free in (False, True)
    )
    expected = padded.evaluate(conversations())
    found = laid_out.evaluate(conversations())
    for name in ("eval_loss", "eval_lm_loss", "eval_vw_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    predictions = [trainer.predict(conversations()).predictions for trainer in (padded, laid_out)]
    assert predictions[0].shape == predictions[1].shape
    torch.testing.assert_close(*map(torch.from_numpy, predictions), atol=1e-4, rtol=1e-4)


def test_a_stream_is_laid_out(tmp_path):
    trainer = trainer_of(tmp_path, dataset=conversations().to_iterable_dataset(), padding_free=True)
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0 and batch_of(trainer)["input_ids"].shape[0] == 1
