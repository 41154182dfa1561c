"""`vwlmm train`: one stage or recipe."""

import difflib
import sys
from dataclasses import dataclass, field, fields


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


def train(argv):
    import torch
    import yaml
    from trl import TrlParser

    from ..data.load import load_dataset
    from ..trainer import VWLmmSFTConfig, VWLmmSFTTrainer
    from ..trainer.checkpoints import is_finished, last_checkpoint, own_checkpoint
    from ..trainer.lora import LoraArguments
    from ..training_run import given_fields

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
        peft_config=lora.peft_config(),
        quantization_config=lora.quantization_config(torch.bfloat16 if config.bf16 else torch.float32),
        run_record={"dataset": arguments.dataset, "recipe": recipe},
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
