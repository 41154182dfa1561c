"""Train the same tiny models in one process or, by recipes/accelerate, in two on the CPU; test_devices.py compares.

python tests/two_processes.py KIND FOLDER      KIND: one, or the name of a file in recipes/accelerate
"""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from helpers import ROOT
from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import sft_config
from modeling_vwlmm.trainer import VWLmmSFTTrainer


LORA = {"r": 2, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
JOINT = {"stage": "joint", "trainable": ["projector", "language_model", "vm_head"]}
CASES = {
    "align": ({"stage": "align"}, {}, None),
    "visual_words": ({"stage": "visual_words"}, {}, None),
    "joint": (JOINT, {}, None),
    "joint-tied": ({"stage": "joint"}, {"llm": "qwen3-tied"}, None),
    "joint-lora": (JOINT, {}, LORA),
    "joint-lora-tied": ({"stage": "joint"}, {"llm": "qwen3-tied"}, LORA),
    "pseudo": ({"stage": "joint", "model_init_kwargs": {"pseudo_image_features": True}}, {}, None),
    "resumed": ({"stage": "joint"}, {}, None),
    "resumed-lora": ({"stage": "joint"}, {}, LORA),
    "accumulated": ({"stage": "joint", "gradient_accumulation_steps": 2, "max_steps": 2}, {}, None),
    # As "joint", and 8 rows, of which two processes take as many as one
    "padding-free": ({**JOINT, "padding_free": True}, {}, None),
    "packed": ({**JOINT, "packing": True, "max_length": 33}, {}, None),
}
# Images a sample, two samples a process: in the first step the second process has text alone
IMAGES = [(2, 1, 0, 0), (0, 1, 2, 1), (0, 0, 1, 2), (1, 1, 1, 0)]


def fsdp_on_the_cpu():
    """accelerate keeps FSDP for accelerators, though torch's runs anywhere, with gathered tensors that wait to be."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = patched
    get_state_dict = Accelerator.get_state_dict

    def waited(self, *args, **kwargs):
        gathered = get_state_dict(self, *args, **kwargs).items()
        return {name: t.wait() if isinstance(t, AsyncCollectiveTensor) else t for name, t in gathered}

    Accelerator.get_state_dict = waited


def write_bases(folder):
    for _, model, _ in CASES.values():
        path = folder / "base" / model.get("llm", "llama")
        if not path.exists():
            model = tiny_model(**model)
            model.save_pretrained(path)
            tiny_processor(model.config).save_pretrained(path)


def run(case, kind, folder):
    arguments, model, lora = CASES[case]
    base = folder.parent.parent / "base" / model.get("llm", "llama")
    processes = 1 if kind == "one" else 2
    arguments = {
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "generation_eval_steps": None if kind == "zero3" else 2,
        "generation_eval_samples": 7,  # two processes ask one twice, and not always about as many images
        "generation_eval_max_new_tokens": 4,
        **arguments,
    }
    dataset = datasets.concatenate_datasets([conversations(images) for images in IMAGES])
    for checkpoint in (None, str(folder / "checkpoint-2")) if case.startswith("resumed") else (None,):
        AcceleratorState._reset_state()  # whose plugins remember the model before
        args = sft_config(folder, **arguments)
        assert args.world_size == processes
        peft_config = LoraConfig(**lora) if lora else None
        trainer = VWLmmSFTTrainer(
            str(base), args, train_dataset=dataset, eval_dataset=dataset, peft_config=peft_config
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate(dataset.select(range(4)))
    trainer.save_model()
    trainer.save_state()


def launch(kind, folder, *cases, options=()):
    """Runs cases of a kind, all if none is named, with options of `accelerate launch`."""
    launcher = []
    if kind != "one":
        config = ROOT / "recipes" / "accelerate" / f"{kind}.yaml"
        processes = ["--num_processes", "2", "--main_process_port", "0"]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), *processes, *options]
    command = [sys.executable, *launcher, __file__, kind, str(folder), *cases]
    cache = str(folder / "cache")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": cache}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    kind, folder, *cases = sys.argv[1:]
    if kind == "fsdp2":
        fsdp_on_the_cpu()
    for case in cases or CASES:
        if os.environ.get("RANK", "0") == "0":
            print("case", case)
        run(case, kind, Path(folder) / kind / case)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
