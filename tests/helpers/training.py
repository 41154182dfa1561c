"""A trainer of a tiny model, its first batch, its first gradients."""

import torch
from transformers import TrainerCallback

from helpers.conversations import PLAIN_TEMPLATE, conversations, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.trainer import VWLmmSFTConfig, VWLmmSFTTrainer


def sft_config(tmp_path, kind=VWLmmSFTConfig, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**{**defaults, **kwargs})


def trainer_of(tmp_path, model=None, dataset=None, template=PLAIN_TEMPLATE, **kwargs):
    model = model or tiny_model()
    return VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, **kwargs),
        train_dataset=conversations() if dataset is None else dataset,
        processing_class=tiny_processor(model.config, template),
    )


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def first_gradients(trainer):
    """The gradients of the first optimizer step, all micro-batches of it."""
    found = {}

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            control.should_training_stop = True

    trainer.add_callback(Record())
    trainer.train()
    return found


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda text: f"{name}: {text}", **tolerance)  # noqa: B023
