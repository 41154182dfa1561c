"""Train the same tiny models in one process, under DDP or under FSDP2 on the CPU; tests/test_devices.py compares.

python tests/two_processes.py KIND FOLDER      KIND: one, ddp or fsdp2
"""

import os
import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from test_trainer import conversations, sft_config, tiny_processor
from tiny import tiny_model
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from modeling_vwlmm import modeling_vwlmm
from modeling_vwlmm.trainer import VWLmmSFTTrainer


LORA = {"r": 2, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
CASES = {
    "align": ({"stage": "align"}, {}, None),
    "visual_words": ({"stage": "visual_words"}, {}, None),
    "joint": ({"stage": "joint", "trainable": ["projector", "language_model", "vm_head"]}, {}, None),
    "joint-tied": ({"stage": "joint"}, {"llm": "qwen3-tied"}, None),
    "joint-lora": ({"stage": "joint", "trainable": ["projector", "language_model", "vm_head"]}, {}, LORA),
    "joint-lora-tied": ({"stage": "joint"}, {"llm": "qwen3-tied"}, LORA),
    "accumulated": ({"stage": "joint", "gradient_accumulation_steps": 2, "max_steps": 2}, {}, None),
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

    AcceleratorState.__init__ = patched
    get_state_dict = Accelerator.get_state_dict

    def waited(self, *args, **kwargs):
        gathered = get_state_dict(self, *args, **kwargs).items()
        return {name: t.wait() if isinstance(t, AsyncCollectiveTensor) else t for name, t in gathered}

    Accelerator.get_state_dict = waited


def run(case, kind, folder):
    import datasets

    AcceleratorState._reset_state()  # whose FSDP plugin remembers the layers of the model before
    arguments, model, lora = CASES[case]
    model = tiny_model(**model)
    processes = 1 if kind == "one" else 2
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(
            folder,
            **{
                "per_device_train_batch_size": 4 // processes,
                "train_sampling_strategy": "sequential",
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 2,
                **arguments,
            },
        ),
        train_dataset=datasets.concatenate_datasets([conversations(images) for images in IMAGES]),
        processing_class=tiny_processor(model.config),
        peft_config=LoraConfig(**lora) if lora else None,
    )
    assert trainer.args.world_size == processes
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def launch(kind, folder):
    """Runs all cases of a kind."""
    processes = 1 if kind == "one" else 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if kind == "fsdp2":
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    command = [sys.executable, *launcher, __file__, kind, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    modeling_vwlmm._CHUNK = 5
    kind, folder, *cases = sys.argv[1:]
    if kind == "fsdp2":
        fsdp_on_the_cpu()
    for case in cases or CASES:
        run(case, kind, Path(folder) / kind / case)
