"""Adapters of tiny models."""

import torch
from peft import LoraConfig

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_batch, tiny_model, without_labels
from helpers.training import sft_config
from modeling_vwlmm.trainer import VWLmmSFTTrainer


SWITCHES = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "two": {"target_modules": ["q_proj", "v_proj"]},
    "not one": {"exclude_modules": ["q_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"bias": "lora_only"},
}


def base_folder(tmp_path, **model):
    model = tiny_model(**model)
    model.save_pretrained(tmp_path / "base")
    tiny_processor(model.config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(tmp_path, base=None, stage="joint", lora=(), **kwargs):
    """An adapter in tmp_path / "adapter", and the trainer."""
    base = base or base_folder(tmp_path)
    arguments = {"stage": stage, "learning_rate": 0.1, "max_steps": 2, **kwargs}
    trainer = VWLmmSFTTrainer(
        str(base),
        sft_config(tmp_path / "adapter", **arguments),
        train_dataset=conversations(),
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", **dict(lora)),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**without_labels(tiny_batch(model.config))).logits
