"""`save_only_trained`: parts alone, as an adapter of the model that they were trained on."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import batch_of, sft_config
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.conversion.merge import merge
from modeling_vwlmm.trainer import VWLmmSFTTrainer


@pytest.fixture
def base(tmp_path):
    model = tiny_model(tower="resnet")
    model.save_pretrained(tmp_path / "base")
    tiny_processor(model.config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def run(base, output_dir, resume=None, **kwargs):
    fields = {"save_strategy": "steps", "save_steps": 1, **kwargs}
    trainer = VWLmmSFTTrainer(base, sft_config(output_dir, **fields), train_dataset=conversations())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("trainable", [["projector"], ["vm_head"], ["vision_tower", "projector"]], ids="+".join)
def test_they_load_and_compute_what_the_whole_model_does(tmp_path, base, trainable):
    settings = {"stage": "visual_words", "trainable": trainable}
    whole = run(base, tmp_path / "whole", **settings)
    run(base, tmp_path / "alone", save_only_trained=True, **settings)
    saved = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    prefixes = {"projector": "multi_modal_projector", "vm_head": "vm_head", "vision_tower": "vision_tower"}
    assert all(any(f".{prefixes[part]}." in name for part in trainable) for name in saved)
    assert not (tmp_path / "alone" / "model.safetensors").exists()
    batch = {name: tensor for name, tensor in batch_of(whole).items() if name != "labels"}
    for folder in ("", "checkpoint-3"):
        expected = VWLmmForCausalLM.from_pretrained(tmp_path / "whole" / folder).eval()
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "alone" / folder).eval()
        with torch.no_grad():
            assert torch.equal(found(**batch).logits, expected(**batch).logits)
            assert torch.equal(found.visual_words(batch["pixel_values"]), expected.visual_words(batch["pixel_values"]))


def test_resumes_to_the_same_weights(tmp_path, base):
    settings = {"stage": "visual_words", "save_only_trained": True}
    run(base, tmp_path / "through", **settings)
    run(base, tmp_path / "resumed", resume=str(tmp_path / "through" / "checkpoint-1"), **settings)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("resumed", "through"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_record_tells_a_changed_base(tmp_path, base):
    settings = {"stage": "visual_words", "save_only_trained": True, "save_strategy": "no"}
    first = run(base, tmp_path / "a", **settings).stages[-1]["base_fingerprint"]
    assert run(base, tmp_path / "b", **settings).stages[-1]["base_fingerprint"] == first
    model = VWLmmForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(base)
    assert run(base, tmp_path / "c", **settings).stages[-1]["base_fingerprint"] != first


@pytest.mark.parametrize("settings", [{"stage": "instruct"}, {}])
def test_an_llm_that_trains_is_refused(tmp_path, base, settings):
    with pytest.raises(ValueError, match="save_only_trained is for stages that do not train the LLM"):
        run(base, tmp_path / "out", save_only_trained=True, **settings)


def test_the_next_stage_starts_from_them_as_from_one_model(tmp_path, base):
    settings = {"stage": "align", "save_strategy": "no"}
    run(base, tmp_path / "whole", **settings)
    run(base, tmp_path / "alone", save_only_trained=True, **settings)
    for name in ("whole", "alone"):
        trainer = run(str(tmp_path / name), tmp_path / f"after_{name}", stage="instruct", save_strategy="no")
        assert [record["stage"] for record in trainer.stages] == ["align", "instruct"]
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("after_alone", "after_whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match="alone is an adapter: .* vwlmm merge"):
        run(str(tmp_path / "alone"), tmp_path / "twice", stage="visual_words", save_only_trained=True)


def test_a_base_that_has_changed_is_refused(tmp_path, base):
    run(base, tmp_path / "alone", stage="align", save_only_trained=True, save_strategy="no")
    model = VWLmmForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match="base has changed since .*alone was trained on it"):
        merge(tmp_path / "alone", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_no_adapter_saves_is_refused(tmp_path, base):
    settings = {"stage": "align", "model_init_kwargs": {"pseudo_image_features": True}}
    with pytest.raises(ValueError, match="an adapter has no config of its own"):
        run(base, tmp_path / "out", save_only_trained=True, **settings)


def test_its_record_says_nothing_of_lora(tmp_path, base):
    assert run(base, tmp_path / "out", stage="align", save_only_trained=True).stages[-1]["peft"] is None


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_merges_in_any_dtype(tmp_path, base, dtype):
    run(base, tmp_path / "alone", stage="align", save_only_trained=True, save_strategy="no")
    merge(tmp_path / "alone", tmp_path / "merged", dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert VWLmmForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == expected
