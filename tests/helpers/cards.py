"""Records that a card is written from, what a card says."""

import json
import re

import yaml
from huggingface_hub import ModelCard

from modeling_vwlmm.hub.card import BEGIN


RUN = [
    {"stage": "convert", "base_model": ["someone/llm", "someone/tower"], "recipe": {"output_dir": "runs/start"}},
    {
        "stage": "align",
        "trainable": ["projector"],
        "base_model": "runs/start",
        "dataset": "someone/captions",
        "recipe": {
            "learning_rate": 0.003,
            "max_steps": 7,
            "output_dir": "/home/someone/runs/align",
            "deepspeed": "/etc/z.json",
        },
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "hardware": {"device": "A Device", "processes": 2},
        "seed": 5,
    },
    {
        "stage": "instruct",
        "base_model": "/home/someone/runs/align",
        "dataset": "/home/someone/secret/data.json",
        "recipe": {"num_train_epochs": 2, "trainable": ["projector"], "output_dir": "runs/instruct"},
        "peft": None,
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "hardware": {"device": "A Device", "processes": 2},
        "seed": 5,
    },
]
RESULTS = [
    {
        "task_type": "visual-question-answering",
        "dataset_type": "someone/questions",
        "dataset_name": "Questions",
        "dataset_split": split,
        "dataset_args": {"questions": 41},
        "metric_type": "accuracy",
        "metric_name": "right answers",
        "metric_value": value,
    }
    for split, value in (("test", 0.8125), ("train", 0.9375))
] + [
    {
        "task_type": "image-feature-extraction",
        "dataset_type": "someone/questions",
        "dataset_name": "Questions",
        "metric_type": "perplexity",
        "metric_value": 17.25,
    }
]


def log(*losses):
    return {
        "log_history": [
            {"step": 5 * i, "loss": loss, "lm_loss": loss, "vw_loss": 0.0} for i, loss in enumerate(losses, 1)
        ]
    }


def write(folder, run=None, results=None, state=None):
    for name, value in (("training_run.json", run), ("eval_results.json", results), ("trainer_state.json", state)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def metadata_of(folder):
    """As a reader of the file finds it, beside this package."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def figures_of(text):
    return set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)*(?:e-?\d+)?", text))


def strange_figures(folder):
    """Figures of a card, but for its citation and what it calls things, that are in no record of its folder."""
    text = ModelCard.load(folder / "README.md").text
    text = text[text.index(BEGIN) : text.index("## Citation")].replace("2403.07720", "").replace("](assets", "")
    records = [path.read_text() for path in folder.glob("*.json") if "tokenizer" not in path.name]
    return figures_of(re.sub(r"\w+://\S+|`[^`]*`", "", text)) - figures_of(" ".join(records))
