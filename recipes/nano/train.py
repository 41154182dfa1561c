"""vwlmm-nano: the quickstart's stages, in whole passes over the training images."""

import argparse
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import torch  # noqa: E402
from read_text import main as read_text  # noqa: E402

from modeling_vwlmm.cli import main as vwlmm  # noqa: E402


RUNS = "runs/nano"
# Steps of 32 samples. There are 3,578 captions and, in four orders, 16,000 conversations
STAGES = {
    "stage1_align": 448,
    "stage2_instruct": 500,
    "stage3_visual_words": 125,
    "stage4_joint": 500,
}


def train(seed):
    base = f"{RUNS}/start"
    read_text(["--output_dir", base, "--seed", str(seed)])
    for recipe, steps in STAGES.items():
        output = f"{RUNS}/{recipe.split('_', 1)[1]}"
        print(f"\n== {recipe} ==", flush=True)
        fields = {"model": base, "output_dir": output, "max_steps": steps, "logging_steps": 5, "seed": seed}
        vwlmm(
            ["train", "--config", f"recipes/quickstart/{recipe}.yaml"]
            + [part for name, value in fields.items() for part in (f"--{name}", str(value))]
        )
        base = output


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    datasets.disable_progress_bars()
    train(arguments.seed)


if __name__ == "__main__":
    main()
