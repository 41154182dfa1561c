"""The command line: `vwlmm VERB ...`, or `python -m modeling_vwlmm VERB ...`."""

import argparse
import difflib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError


@dataclass
class TrainArguments:
    """What a recipe trains on, beside the fields of [`VWLmmSFTConfig`]."""

    model: str = field(metadata={"help": "Folder or repository of the model to start from."})
    dataset: str = field(
        metadata={
            "help": "A .json or .jsonl file in LLaVA's format, with image_folder; easy-vqa/caption, "
            "easy-vqa/conversation or easy-vqa/shuffled-conversation; or a dataset in TRL's vision format, its "
            "repository or a folder written by `Dataset.save_to_disk`."
        }
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images that a data file names."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "What to evaluate on, named as the dataset is, with the same image_folder."},
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the eval_dataset."})


def load_dataset(name, image_folder=None, split="train"):
    """The dataset that a recipe names, see [`TrainArguments`]."""
    from . import data

    if name.startswith("easy-vqa/"):
        try:
            return data.easy_vqa(split, name.removeprefix("easy-vqa/"))
        except ImportError as error:
            raise ValueError(f"dataset {name} needs the package easy-vqa: pip install easy-vqa") from error
    if name.endswith((".json", ".jsonl")):
        if image_folder is None:
            raise ValueError(f"dataset {name} is a data file, so image_folder must say where its images are")
        return data.load_conversations(name, image_folder)

    import datasets

    if Path(name).is_dir():
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f'dataset {name} has no split "{split}", but {", ".join(dataset)}')
            dataset = dataset[split]
        return dataset
    return datasets.load_dataset(name, split=split)


def train(argv):
    import torch
    import yaml
    from transformers import AutoProcessor
    from trl import TrlParser

    from .checkpoints import is_finished, last_checkpoint, own_checkpoint
    from .lora import LoraArguments
    from .trainer import VWLmmSFTConfig, VWLmmSFTTrainer
    from .training_run import given_fields

    kinds = (TrainArguments, VWLmmSFTConfig, LoraArguments)
    parser = TrlParser(kinds, prog="vwlmm train", allow_abbrev=False)
    parser.epilog = "example: vwlmm train --config recipes/stage2_instruct.yaml --learning_rate 1e-5"
    parser.add_argument("--config", help="the recipe, a YAML file of the fields below; arguments override it")
    # TRL's parser looks for "--config FILE" alone
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument[:2] == "--" else [argument])]
    named = {part[2:].replace("-", "_") for part in argv if part[:2] == "--"}
    named |= {name.removeprefix("no_") for name in named}
    if "--config" in argv[:-1]:
        recipe = argv[argv.index("--config") + 1]
        with open(recipe) as file:
            try:
                given = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{recipe} is not YAML: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{recipe} is not a recipe: expected a YAML mapping of fields to values")
        known = [f.name for kind in kinds for f in fields(kind)] + ["env"]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(f'{recipe}: unknown field "{name}"' + (f', is "{close[0]}" meant?' if close else ""))
        named |= given.keys()
    arguments, config, lora, *_ = parser.parse_args_and_config(argv)
    recipe = {name: value for part in (arguments, config, lora) for name, value in given_fields(part, named).items()}

    dataset = load_dataset(arguments.dataset, arguments.image_folder, arguments.dataset_split)
    eval_dataset = None
    if arguments.eval_dataset is not None:
        eval_dataset = load_dataset(arguments.eval_dataset, arguments.image_folder, arguments.eval_split)
    trainer = VWLmmSFTTrainer(
        model=arguments.model,
        args=config,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=AutoProcessor.from_pretrained(arguments.model),
        peft_config=lora.peft_config(),
        quantization_config=lora.quantization_config(torch.bfloat16 if config.bf16 else torch.float32),
        given={"dataset": arguments.dataset, "recipe": recipe},
    )
    if config.resume_from_checkpoint is None:
        checkpoint = own_checkpoint(config.output_dir, trainer.stages)
        if checkpoint and is_finished(config.output_dir, checkpoint):
            _say(trainer, f"{config.output_dir} is finished, there is nothing left to do")
            return
        if checkpoint:
            _say(trainer, f"going on from {checkpoint}")
    else:
        checkpoint = config.resume_from_checkpoint
        checkpoint = {"true": True, "false": False}.get(str(checkpoint).lower(), checkpoint)
        if checkpoint is False and (last := last_checkpoint(config.output_dir)):
            raise ValueError(f"{last} is there: to start anew, remove it or name another output_dir")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    except KeyboardInterrupt:
        last = last_checkpoint(config.output_dir)
        raise KeyboardInterrupt(f", the last checkpoint is {last}" if last else ", there is no checkpoint") from None


def _say(trainer, message):
    if trainer.is_world_process_zero():
        print(f"vwlmm train: {message}", file=sys.stderr)


def _quiet():
    from transformers.utils import logging

    # What does not load is told in one line, not in a table
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _load(folder):
    import torch
    from transformers import AutoProcessor

    from .modeling_vwlmm import VWLmmForCausalLM

    _quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VWLmmForCausalLM.from_pretrained(folder).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def _open(paths):
    from .data import open_images

    return open_images({"images": [{"path": path, "bytes": None} for path in paths]})


def convert(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm convert",
        description="Make a VW-LMM model of a published VW-LMM checkpoint, of a LLaVA checkpoint (the original's or "
        "transformers'), or of an LLM and a vision tower; or, with --to llava, a LLaVA checkpoint of a VW-LMM model.",
        epilog="example: vwlmm convert MYTH-Lab/VW-LMM-Vicuna-7b vw-lmm-vicuna-7b",
    )
    parser.add_argument("source", nargs="?", help="folder or repository of the checkpoint")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--to", choices=["vwlmm", "llava"], default="vwlmm")
    parser.add_argument("--language-model", help="folder or repository of an LLM, or a GGUF file, to start anew from")
    parser.add_argument(
        "--vision-tower",
        help="folder or repository of a vision tower: to start anew from, or instead of the one that a published "
        "checkpoint names",
    )
    parser.add_argument(
        "--variant", help="vicuna, mistral or vicuna-pif: what a published checkpoint is, if its config does not say"
    )
    parser.add_argument(
        "--vm-head",
        choices=["random", "lm_head"],
        help="how a new VM head starts: at random (default) or as a copy of the LLM's own head",
    )
    parser.add_argument(
        "--vision-feature-layer",
        type=int,
        action="append",
        metavar="N",
        help="which hidden states of a new model's tower become patches: -1 the last, -2 the one before it (default); "
        "given several times, they are put side by side",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's if not given")
    arguments = parser.parse_intermixed_args(argv)
    is_new = arguments.language_model is not None
    if is_new == (arguments.source is not None) or (is_new and not arguments.vision_tower):
        parser.error("expected SRC DST, or --language-model X --vision-tower Y DST")
    if (is_new and arguments.variant) or (arguments.to == "llava" and (is_new or arguments.vision_tower)):
        parser.error("--variant is for published checkpoints; --to llava takes SRC DST alone")
    if arguments.vision_feature_layer and not is_new:
        parser.error("--vision-feature-layer is for a new model: the config of a checkpoint says which it reads")

    import torch

    from .convert import combine, convert, convert_to_llava

    _quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    start = {"vm_head": arguments.vm_head or "random", "seed": arguments.seed, "dtype": dtype}
    if is_new:
        if layers := arguments.vision_feature_layer:
            start["vision_feature_layer"] = layers[0] if len(layers) == 1 else layers
        combine(arguments.language_model, arguments.vision_tower, arguments.destination, **start)
    elif arguments.to == "llava":
        convert_to_llava(arguments.source, arguments.destination, dtype=dtype)
    else:
        convert(arguments.source, arguments.destination, arguments.vision_tower, arguments.variant, **start)


def generate(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm generate",
        description="Answer a question about images, word by word.",
        epilog='example: vwlmm generate runs/quickstart/joint cat.png --prompt "what is this?"',
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args(argv)

    from transformers import TextStreamer

    images = _open(arguments.images)
    model, processor = _load(arguments.model)
    content = [{"type": "image", "image": image} for image in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": arguments.prompt}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs.to(model.device, model.dtype),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )


def words(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm words",
        description="Draw the most probable visual word of every patch over the images.",
        epilog="example: vwlmm words runs/quickstart/joint a.png b.png --output words.png",
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--output", help="the picture to write")
    parser.add_argument("--json", action="store_true", help="print the words and probabilities of every patch")
    parser.add_argument("--top", type=int, default=3, help="words a patch in the JSON")
    arguments = parser.parse_args(argv)
    if not (arguments.output or arguments.json):
        parser.error("nothing to do: give --output FILE.png, --json or both")

    from .words import draw_words, top_words

    images = _open(arguments.images)
    model, processor = _load(arguments.model)
    found = top_words(model, processor, images, k=arguments.top)
    if arguments.output:
        draw_words(processor, images, found).save(arguments.output)
    if arguments.json:
        print(
            json.dumps(
                [{"image": path, "patches": patches} for path, patches in zip(arguments.images, found, strict=True)]
            )
        )


def merge(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm merge",
        description="Merge an adapter into the model that it was trained on: a model that needs no PEFT.",
        epilog="example: vwlmm merge runs/7b/lora runs/7b/merged",
    )
    parser.add_argument("adapter", help="folder or repository")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the base model's if not given")
    arguments = parser.parse_args(argv)

    import torch

    from .lora import merge

    _quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    merge(arguments.adapter, arguments.destination, dtype)


def push(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm push",
        description="Push a model or an adapter to the Hub, with its processor, card, logs and code. It is loaded "
        "first, with and without this package, and looked at afterwards.",
        epilog="example: vwlmm push runs/quickstart/joint vwlmm-easy-vqa --private",
    )
    parser.add_argument("folder", help="of the model or adapter; it stays as it is")
    parser.add_argument("repo", help="name, or user/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--base-model", help="repository of an adapter's base model, if it was trained on a folder")
    parser.add_argument("--dry-run", action="store_true", help="send nothing: print the files, their sizes, the card")
    arguments = parser.parse_args(argv)

    import tempfile

    from huggingface_hub.utils import logging

    from .hub import prepare, push

    _quiet()
    if not sys.stderr.isatty():
        logging.set_verbosity_error()
    if not arguments.dry_run:
        commit = push(
            arguments.folder,
            arguments.repo,
            base_model=arguments.base_model,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
        )
        print(commit.pr_url or commit.commit_url)
        return
    with tempfile.TemporaryDirectory(prefix="vwlmm-push-") as scratch:
        staged = Path(scratch) / "repository"
        prepare(arguments.folder, staged, arguments.repo, arguments.base_model)
        sizes = {path: path.stat().st_size for path in sorted(staged.rglob("*")) if path.is_file()}
        for path, size in sizes.items():
            print(f"{size:15,}  {path.relative_to(staged)}")
        print(f"{sum(sizes.values()):15,}  bytes in {len(sizes)} files\n")
        print((staged / "README.md").read_text(encoding="utf-8"))


VERBS = {
    "train": train,
    "convert": convert,
    "merge": merge,
    "push": push,
    "generate": generate,
    "words": words,
}
USAGE = """usage: vwlmm VERB ...

  train     one stage or recipe:  vwlmm train --config recipes/quickstart/stage1_align.yaml
  convert   another checkpoint:   vwlmm convert SRC DST
  merge     adapter and model:    vwlmm merge ADAPTER DST
  push      share on the Hub:     vwlmm push FOLDER REPO
  generate  answer a question:    vwlmm generate MODEL IMAGE [IMAGE ...] --prompt TEXT
  words     draw visual words:    vwlmm words MODEL IMAGE [IMAGE ...] --output FILE.png

vwlmm VERB --help says more."""


def main(argv=None):
    """Run a verb. Exit status 2 and one line on stderr for a wrong call or bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not argv or argv[0] not in VERBS:
        print(USAGE if not argv else f'vwlmm: no verb "{argv[0]}", there are: {", ".join(VERBS)}', file=sys.stderr)
        sys.exit(2)
    try:
        VERBS[argv[0]](argv[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        message = str(error)
        if "Original Traceback" in message:  # of a DataLoader worker
            message = message.strip().splitlines()[-1]
        print(f"vwlmm {argv[0]}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\nvwlmm {argv[0]}: interrupted{stop}", file=sys.stderr)
        sys.exit(130)
