"""The quickstart: a VW-LMM trained through its four stages on easy-VQA, and what came of it."""

import argparse
import os
import shutil
import time
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from measure import accuracy, naming_share  # noqa: E402
from read_text import main as read_text  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: E402

from modeling_vwlmm.cli import main as vwlmm  # noqa: E402
from modeling_vwlmm.data import open_images  # noqa: E402
from modeling_vwlmm.words import draw_words, top_words  # noqa: E402


STAGES = {
    "stage1_align": "stage 1: align the projector",
    "stage2_instruct": "stage 2: answer questions",
    "stage3_visual_words": "stage 3: learn visual words",
    "stage4_joint": "stage 4: text and visual words at once",
    "pseudo_image_features": "variant: pseudo image features, from stage 3",
}
MODELS = {"VW-LMM": "runs/quickstart/joint", "VW-LMM, pseudo image features": "runs/quickstart/pseudo_image_features"}
# CNN + LSTM, https://github.com/Kshitij-Ambilduke/VQA
BASELINE = {"overall": 0.8760}


def train(seed):
    started = time.perf_counter()
    print("\n== text: a tiny LLM reads the training questions and answers ==", flush=True)
    read_text(["--seed", str(seed)])
    for recipe, title in STAGES.items():
        print(f"\n== {title} ==", flush=True)
        path = Path(f"recipes/quickstart/{recipe}.yaml")
        # Of an earlier run, beside which vwlmm train would stop
        shutil.rmtree(yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"], ignore_errors=True)
        vwlmm(["train", "--config", str(path), "--seed", str(seed)])
    return time.perf_counter() - started


def show_words(model, processor, answered, path):
    """Six test images with their visual words and a question about each."""
    shown = {}
    for row, found in answered:
        if row["kind"] == "shape" and row["id"].split("-")[0] not in shown and len(shown) < 6:
            shown[row["id"].split("-")[0]] = (
                open_images(row)[0],
                f"{row['messages'][0]['content'][-1]['text'].strip()} {found}",
            )
    images, captions = zip(*shown.values(), strict=True)
    draw_words(processor, images, top_words(model, processor, images), captions, columns=2).savefig(path)
    print(f"visual words of six test images: {path}")


def report():
    lines = {"CNN + LSTM (published)": BASELINE}
    naming = {}
    for name, folder in MODELS.items():
        model, processor = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        lines[name], answered = accuracy(model, processor)
        naming[name] = naming_share(model, processor)
        show_words(model, processor, answered, f"{folder}/visual_words.png")
        if len(naming) == 1:
            examples = answered[:: len(answered) // 5][:5]

    kinds = ["overall", "color", "shape", "yes/no"]
    print(f"\n{'right answers, % of 9,673 test questions':42}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, figures in lines.items():
        print(f"{name:42}" + "".join(f"{100 * figures[k]:10.2f}" if k in figures else f"{'-':>10}" for k in kinds))
    print(f"\n{'patches whose top three words name the object, %':50}{'its own':>10}{'shuffled':>10}{'patches':>10}")
    for name, (share, shuffled, patches) in naming.items():
        print(f"{name:50}{100 * share:10.1f}{100 * shuffled:10.1f}{patches:10}")
    print("\nfive questions:")
    for row, found in examples:
        question = row["messages"][0]["content"][-1]["text"].strip()
        print(
            f"  image {row['id'].split('-')[0]:>4}: {question} {found}"
            + ("" if found == row["answer"] else f" ({row['answer']})")
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    datasets.disable_progress_bars()
    seconds = train(arguments.seed)
    report()
    print(f"\ntraining took {seconds / 60:.1f} minutes on {os.cpu_count()} cores, all of it counted")


if __name__ == "__main__":
    main()
