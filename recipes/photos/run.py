"""A VW-LMM of real parts, trained on photos: parts, data, reading, four stages, a variant, and what came of them."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from parts import find_llm, find_stamps, find_tower
from transformers import AutoProcessor

from modeling_vwlmm.hub.card import write_card


RECIPES, RUNS = Path("recipes/photos"), Path("runs/photos")
STAGES = {
    "read": "before stage 1: the LLM reads words where images will stand",
    "stage1_align": "stage 1: align the projector",
    "stage2_instruct": "stage 2: answer questions",
    "stage3_visual_words": "stage 3: learn visual words",
    "stage4_joint": "stage 4: text and visual words at once",
    "pseudo_image_features": "variant: pseudo image features, from stage 3",
}
# glibc gives the memory of large tensors back to the system and asks for it again at every step
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.getcwd(),
}

# What stands in a card beside what is recorded
CARD = """---
language: en
---

# {title}

A VW-LMM of 0.2 billion weights, made by `make photos` of [SmolLM2-135M-Instruct](https://arxiv.org/abs/2502.02737)
and an EfficientNet-Lite0 (both Apache-2.0), and trained for minutes on a CPU: a demonstration of visual words, which
knows little. {data}
"""
STAMPS = (
    "It saw 451 photos and drawings of single objects, the stamps of [Tux Paint](https://tuxpaint.org) (GPL-2). It is "
    "measured on photos of objects that are not among them, whose names it therefore cannot know."
)


def run(*command):
    """A process a step, so that each starts with the memory that the one before it used."""
    subprocess.run([sys.executable, *map(str, command)], check=True, env={**os.environ, **ENVIRONMENT})


def read_own(data):
    """The records of a data file that are about one image."""
    read = json.loads if data.endswith(".json") else lambda text: [json.loads(line) for line in text.splitlines()]
    return [record for record in read(Path(data).read_text(encoding="utf-8")) if isinstance(record.get("image"), str)]


def split_own(data, folder, held_out=None, share=8, seed=0):
    """Own conversations as training and held-out data: every eighth image, but 200 at most, if no file has them."""
    train = read_own(data)
    if held_out is not None:
        tests = read_own(held_out)
    else:
        images = sorted({record["image"] for record in train})
        chosen = set(random.Random(seed).sample(images, min(200, max(1, len(images) // share))))
        tests = [record for record in train if record["image"] in chosen]
        train = [record for record in train if record["image"] not in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in {"reading": train, "captions": train, "conversations": train, "held_out": tests}.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return tuple(len({record["image"] for record in records}) for records in (train, tests))


def prepare(arguments):
    """The data, and a model that has not been trained: an LLM, a tower, and a projector and a VM head between them."""
    data, images = RUNS / "data", arguments.images or RUNS / "data/images"
    if arguments.data:
        train, held_out = split_own(arguments.data, data, arguments.held_out)
    else:
        import stamps

        train, held_out = stamps.make(find_stamps(RUNS / "stamps"), data)
    print(f"{train} pictures to train on, {held_out} held out")
    find_tower()
    run(RECIPES / "tower.py", RUNS / "tower")
    new = ("--language-model", find_llm(), "--vision-tower", RUNS / "tower", "--vision-feature-layer", -1)
    run("-m", "modeling_vwlmm", "convert", *new, "--dtype", "float32", "--seed", arguments.seed, RUNS / "start")
    processor = AutoProcessor.from_pretrained(RUNS / "start")
    # SmolLM2's own template begins every conversation with the same 21 tokens, nearly as many as a picture takes
    processor.chat_template = (RECIPES / "chat_template.jinja").read_text(encoding="utf-8")
    processor.save_pretrained(RUNS / "start")
    return images


def train(images, arguments):
    for name, title in STAGES.items():
        print(f"\n== {title} ==", flush=True)
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        steps = max(1, round(arguments.times * recipe["max_steps"]))
        run(
            *("-m", "modeling_vwlmm", "train"),
            *("--config", RECIPES / f"{name}.yaml", "--image_folder", images),
            *("--max_steps", steps, "--seed", arguments.seed, "--use_cpu", not torch.cuda.is_available()),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="your own conversations in LLaVA's JSON, in place of the stamps")
    parser.add_argument("--images", help="folder of the images that they name")
    parser.add_argument("--held_out", help="your own conversations to measure on, in place of every eighth image")
    parser.add_argument("--times", type=float, default=1.0, help="how many times the recipes' steps to train")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.images):
        parser.error("--data and --images belong together")
    if arguments.held_out and not arguments.data:
        parser.error("--held_out belongs to --data")
    if RUNS.joinpath("start").exists():
        raise SystemExit(f"make photos: {RUNS} has a run: remove or rename it to start anew")
    images = prepare(arguments)
    started = time.perf_counter()
    train(images, arguments)
    minutes, memory = (time.perf_counter() - started) / 60, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    cores = len(os.sched_getaffinity(0))
    print(f"\ntraining took {minutes:.1f} minutes on {cores} core(s) and {memory / 2**20:.1f} GiB of memory")
    for model in ("joint", "pseudo_image_features"):
        print(f"\n== {model} ==", flush=True)
        run(RECIPES / "measure.py", RUNS / model, "--images", images, "--save")
        text = CARD.format(title=f"vwlmm-photos-{model}", data="" if arguments.data else STAMPS)
        write_card(RUNS / model, card_text=text)
        print(f"its pictures and card: {RUNS / model}/visual_words.png, relative_words.png, README.md")


if __name__ == "__main__":
    main()
