"""`vwlmm merge`: adapters merged without a trace."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor

from helpers.adapters import SWITCHES, base_folder, logits_of, train
from helpers.conversations import picture
from helpers.tiny import LLMS, tiny_batch
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main
from modeling_vwlmm.conversion.merge import merge
from modeling_vwlmm.hub.card import write_card


@pytest.mark.parametrize("switch", ["plain", "dora", "rslora"])
@pytest.mark.parametrize("llm", LLMS)
def test_merged_logits_are_the_adapters(tmp_path, llm, switch):
    base = base_folder(tmp_path, llm=llm)
    parts = ["projector", "language_model", "vm_head"]
    model = train(tmp_path, base, trainable=parts, lora=SWITCHES[switch], learning_rate=0.01).model
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert not list((tmp_path / "merged").glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is VWLmmForCausalLM and not any("lora" in name for name in merged.state_dict())
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(expected, logits_of(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    words = model.get_base_model().visual_words(pixel_values)
    torch.testing.assert_close(merged.visual_words(pixel_values), words, rtol=1e-5, atol=1e-6)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor(images=picture(0), text="<image>")["input_ids"]


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["embeddings", "both", "both at once", "head", "rows"],
)
def test_adapters_of_tied_weights(tmp_path, lora):
    """What PEFT merges into the embeddings goes into a tied head as well, unless they are parted."""
    model = VWLmmForCausalLM.from_pretrained(base_folder(tmp_path, llm="llama-tied", pseudo_image_features=True))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    is_tied = merged.lm_head.weight is merged.get_input_embeddings().weight
    is_still_tied = bool({"ensure_weight_tying", "trainable_token_indices"} & lora.keys())
    assert is_tied == merged.config.tie_word_embeddings == merged.config.text_config.tie_word_embeddings
    assert is_tied == is_still_tied


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vwlmm")]
    return line


def test_a_merged_model_has_the_config_it_was_trained_with(tmp_path):
    base = base_folder(tmp_path, visual_word_target="language_model", detach_visual_words=True)
    train(tmp_path, base, stage="joint", visual_word_loss_weight=0.5, learning_rate=0.01)
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert (config.visual_word_target, config.visual_word_loss_weight) == ("visual_words", 0.5)
    assert config.detach_visual_words


def test_merging_what_changes_nothing(tmp_path, capsys):
    train(tmp_path, trainable=["language_model"], learning_rate=0.0)
    assert "changes nothing" in refused(capsys, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_what_is_no_adapter(tmp_path, capsys):
    base = base_folder(tmp_path)
    assert f"{base} is no adapter" in refused(capsys, "merge", base, tmp_path / "merged")
    train(tmp_path, base)
    assert "exists already" in refused(capsys, "merge", tmp_path / "adapter", base)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "no/base"}))
    assert "no/base" in refused(capsys, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merged_model_keeps_the_losses_of_its_last_stage(tmp_path):
    trainer = train(tmp_path)
    trainer.save_state()
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert json.loads((tmp_path / "merged" / "trainer_state.json").read_text())["global_step"] == 2
    write_card(tmp_path / "merged")
    losses = json.loads((tmp_path / "merged" / "assets" / "losses.json").read_text())
    assert losses[-1]["step"] == [1, 2]


def test_a_damaged_processor_of_an_adapter_is_not_replaced_by_another(tmp_path):
    train(tmp_path)
    (tmp_path / "adapter/processor_config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match="adapter/processor_config.json"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / "adapter" / name).unlink()
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert AutoProcessor.from_pretrained(tmp_path / "merged").tokenizer
