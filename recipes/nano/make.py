"""vwlmm-nano, from nothing to its repository: the quickstart's stages, measured, in hub_card/vwlmm-nano.

The recipes are those in recipes/quickstart/, of which the first two get more steps here.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import measure  # noqa: E402
import read_text  # noqa: E402
import torch  # noqa: E402

from modeling_vwlmm.cli import main as vwlmm  # noqa: E402
from modeling_vwlmm.data import easy_vqa, open_images  # noqa: E402
from modeling_vwlmm.hub.card_pictures import EXAMPLES  # noqa: E402
from modeling_vwlmm.hub.push import prepare  # noqa: E402
from modeling_vwlmm.hub.repository import read_folder  # noqa: E402


REPOSITORY = Path("hub_card/vwlmm-nano")
START, JOINT = "runs/nano/start", "runs/nano/joint"
# Steps of 32 samples: stage 1 passes four times over the 3,578 captions, stage 2 once over the 16,000 conversations
STAGES = {"align": 448, "instruct": 500, "visual_words": 100, "joint": 200}
# What stands in its card beside what is recorded
CARD = """---
license: apache-2.0
language: en
widget:
- text: what color is the shape?
  src: examples/0.png
---

# vwlmm-nano

A VW-LMM to try things out with, small enough to come with its source code and to be trained on two CPU cores while you
wait (`make nano`). It answers the questions of [easy-VQA](https://github.com/vzhou842/easy-VQA) about images of one
coloured shape; about anything else it knows nothing, and it has no words for it.
"""


def train(seed):
    read_text.main(["--output_dir", START, "--seed", str(seed)])
    model = START
    for number, (stage, steps) in enumerate(STAGES.items(), start=1):
        print(f"\n== {stage} ==", flush=True)
        output = f"runs/nano/{stage}"
        shutil.rmtree(output, ignore_errors=True)  # of an earlier run, beside which vwlmm train would stop
        fields = {"model": model, "output_dir": output, "max_steps": steps, "logging_steps": 5, "seed": seed}
        arguments = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
        vwlmm(["train", "--config", f"recipes/quickstart/stage{number}_{stage}.yaml", *arguments])
        model = output


def save_examples(folder):
    """Six test images, for the card to show visual words on."""
    (folder / EXAMPLES).mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(easy_vqa("test", "caption").select(range(6))):
        open_images(row)[0].save(folder / EXAMPLES / f"{i}.png")


def make_repository(folder):
    """Replace the repository folder by what `vwlmm push` would send of a model's."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(read_folder(folder), Path(scratch), REPOSITORY.name, card_text=CARD)
        shutil.rmtree(REPOSITORY, ignore_errors=True)
        shutil.copytree(prepared.folder, REPOSITORY)
    size = sum(path.stat().st_size for path in REPOSITORY.rglob("*") if path.is_file())
    print(f"{REPOSITORY}: {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refresh", action="store_true", help="train nothing: renew the code and the card")
    arguments = parser.parse_args()
    if arguments.refresh:
        make_repository(REPOSITORY)
        return
    torch.set_num_threads(os.cpu_count())
    datasets.disable_progress_bars()
    train(arguments.seed)
    measure.main([JOINT, "--save"])
    save_examples(Path(JOINT))
    make_repository(JOINT)


if __name__ == "__main__":
    main()
