"""Adapters of PEFT that are no LoRA: they train, generate and load again, on the LLM alone."""

import json

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.adapters import base_folder, logits_of
from helpers.conversations import conversations
from helpers.tiny import IMAGE, tiny_batch, without_labels
from helpers.training import sft_config
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.conversion.merge import merged_model
from modeling_vwlmm.trainer import VWLmmSFTTrainer


KINDS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt encoder": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4),
    "RandLoRA": lambda: peft.RandLoraConfig(task_type="CAUSAL_LM", r=4),
    "SHiRA": lambda: peft.ShiraConfig(task_type="CAUSAL_LM", r=2),
    "AdaLoRA": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=4),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "LN tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=2),
    "tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 6]),
}


def trainer_with(tmp_path, base, peft_config):
    return VWLmmSFTTrainer(
        model=str(base),
        args=sft_config(tmp_path / "run", max_steps=1, stage="joint"),
        train_dataset=conversations(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_train_generate_and_load_again(tmp_path, kind):
    base = base_folder(tmp_path)
    trainer = trainer_with(tmp_path, base, KINDS[kind]())
    frozen = ("vision_tower", "vm_head", "lm_head")
    assert not [
        n for n, p in trainer.model.named_parameters() if p.requires_grad and any(part in n for part in frozen)
    ]
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(VWLmmForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    inputs = without_labels(tiny_batch(loaded.config, [(3, IMAGE, 4)]))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    assert len(trainer.model.generate(**inputs, max_new_tokens=2, do_sample=False)[0]) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_merged_or_refused(tmp_path, kind):
    trainer = trainer_with(tmp_path, base_folder(tmp_path), KINDS[kind]())
    with torch.no_grad():  # steps of most kinds are too small to be seen, those of a new one especially
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    trainer.save_model(tmp_path / "adapter")
    if kind.startswith("prompt"):
        with pytest.raises(ValueError, match=r"is of the kind (PROMPT_TUNING|P_TUNING), which cannot be merged"):
            merged_model(tmp_path / "adapter")
    else:
        expected = logits_of(trainer.model)
        torch.testing.assert_close(logits_of(merged_model(tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(r=2, trainable_token_indices=[3, 4]), "trainable_token_indices cannot .* the embeddings"),
        (peft.LoraConfig(r=2, trainable_token_indices={"lm_head": [3]}), r'modules_to_save=\["lm_head"\]'),
        (peft.TrainableTokensConfig(token_indices=[3, 4]), "^token_indices cannot train rows of the lm_head"),
    ],
)
def test_rows_of_the_head_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, base_folder(tmp_path, llm="llama-tied"), config)


def test_what_is_advised_instead_trains_head_and_embeddings_as_one(tmp_path):
    config = peft.LoraConfig(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    trainer = trainer_with(tmp_path, base_folder(tmp_path, llm="llama-tied"), config)
    trainer.train()
    base = trainer.model.get_base_model()
    assert torch.equal(base.lm_head.weight, base.get_input_embeddings().weight)


def test_an_adapter_that_cannot_be_loaded_again_is_refused(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match='"pissa_niter_4" cannot be loaded again: use "pissa"'):
        trainer_with(tmp_path, base_folder(tmp_path), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=3), "the kind PREFIX_TUNING cannot be trained here: .* a cache"),
        (peft.PolyConfig(r=2, n_tasks=1, n_skills=1), "the kind POLY cannot be trained here: it takes task_ids"),
        (peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "the kind ADAPTION_PROMPT cannot be trained"),
    ],
)
def test_kinds_that_take_more_than_the_text_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, base_folder(tmp_path), config)


@pytest.mark.parametrize("config", [KINDS["AdaLoRA"](), peft.LoraConfig(r=2, use_dora=True)])
def test_auto_classes_load_magnitudes_and_ranks(tmp_path, config):
    trainer = trainer_with(tmp_path, base_folder(tmp_path), config)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    trainer.save_model(tmp_path / "adapter")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits_of(trainer.model))


def test_an_adapter_whose_base_changed_at_random_is_not_merged(tmp_path):
    trainer_with(tmp_path, base_folder(tmp_path), peft.LoraConfig(r=2)).save_model(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match='"pissa_niter_4", and cannot be merged'):
        merged_model(tmp_path / "adapter")
