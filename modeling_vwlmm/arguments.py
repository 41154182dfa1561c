"""The fields of a recipe beside those of TRL's SFTConfig. No torch is imported: `vwlmm train --help` lists them."""

import json
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig


if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


@dataclass
class TrainArguments:
    """What a recipe trains, and on what."""

    model: str = field(metadata={"help": "Folder or repository of the model to start from."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A .json or .jsonl file in LLaVA's format, with image_folder; easy-vqa/caption, "
            "easy-vqa/conversation or easy-vqa/shuffled-conversation; or a dataset in TRL's vision format, its "
            "repository, a folder of its files (parquet for example), or one written by `Dataset.save_to_disk`."
        },
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images that a data file names."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset to evaluate on, named in the same ways, with the same image_folder."},
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the eval_dataset."})


@dataclass
class MixedDataset(DatasetConfig):
    """One of the `datasets` of a recipe, with the fields of TRL's [`~trl.scripts.utils.DatasetConfig`].

    `path` may be whatever `dataset` may be in [`TrainArguments`], with an `image_folder` where that takes one:
    that of the recipe if not given. The `fraction` is the share of the mixture: without `streaming` as in TRL, with it
    the probability of each row.
    """

    image_folder: str | None = None

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)
        if self.image_folder is not None:
            self.image_folder = os.path.expanduser(self.image_folder)
        if self.columns is not None:
            self.columns = list(dict.fromkeys([self.columns] if isinstance(self.columns, str) else self.columns))


@dataclass
class MixtureArguments(DatasetMixtureConfig):
    """TRL's [`~trl.DatasetMixtureConfig`], whose data sets may be those of [`MixedDataset`]."""

    datasets: list[MixedDataset] = field(  # type: ignore[assignment]  # an entry of theirs, and more
        default_factory=list,
        metadata={
            "help": "Several data sets instead of one dataset. In a recipe a list of mappings with path, image_folder "
            "(if not that of the recipe) and fraction (its share), and name, data_dir, data_files, split and columns "
            "as in TRL."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data as they are needed. With max_steps; shuffle_dataset shuffles 1,000 rows."},
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of the data that is held out, in place of an eval_dataset."}
    )

    def __post_init__(self) -> None:
        # A text is a path, as on a command line
        given: list[Any] = [{"path": entry} if isinstance(entry, str) else entry for entry in self.datasets]
        self.datasets = [MixedDataset(**entry) if isinstance(entry, dict) else entry for entry in given]


@dataclass
class VWLmmArguments:
    """What [`VWLmmSFTConfig`] adds to TRL's [`~trl.SFTConfig`], and explains."""

    stage: str | None = field(
        default=None,
        metadata={"help": "align, instruct, visual_words, joint or read: sets the next four fields if not given."},
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts that train, of vision_tower, projector, language_model, vm_head. All if neither this nor a "
            "stage is given."
        },
    )
    visual_word_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the visual-word loss. The model config's if not given."}
    )
    visual_word_target: str | None = field(
        default=None,
        metadata={
            "help": "'visual_words' for joint training, 'language_model' for VM-head training. The model config's if "
            "not given."
        },
    )
    detach_visual_words: bool | None = field(
        default=None,
        metadata={"help": "Stop the gradient through the visual words as target. The model config's if not given."},
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the text loss only on what the assistant says. So it is for `messages` if not given."
        },
    )
    projector_from_words: bool = field(
        default=False,
        metadata={
            "help": "Start the projector as a dictionary of the data's most frequent words, instead of as it is."
        },
    )
    save_only_trained: bool = field(
        default=False,
        metadata={"help": "Save what trained alone, as an adapter of its base model, where the LLM is frozen."},
    )
    skip_broken_images: bool = field(
        default=False,
        metadata={"help": "Leave out samples whose image cannot be read, and count them, instead of stopping."},
    )
    generation_eval_steps: int | None = field(
        default=None,
        metadata={"help": "Every that many steps, answer questions of the eval_dataset and log generation_accuracy."},
    )
    generation_eval_samples: int = field(default=64, metadata={"help": "Questions of the eval_dataset to answer."})
    generation_eval_max_new_tokens: int = field(default=64, metadata={"help": "The longest of these answers."})


@dataclass
class LoraArguments:
    """The fields of a recipe for LoRA and QLoRA, which have the names of TRL's [`~trl.ModelConfig`]."""

    use_peft: bool = field(default=False, metadata={"help": "Train an adapter instead of the LLM itself."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers of the LLM, or a regular expression. All its linear ones if not given."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that train whole. The projector and the VM head if not given and the stage says so."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Train weights' magnitudes beside their directions."})
    lora_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More fields of peft.LoraConfig, as a mapping, init_lora_weights for example."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: load the LLM in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the LLM in 8 bits (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales too."})

    def peft_config(self) -> "LoraConfig | None":
        """The [`~peft.LoraConfig`], None without `use_peft`."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        targets: Any = self.lora_target_modules
        if targets and len(targets) == 1 and (targets == ["all-linear"] or not re.fullmatch(r"[\w.]+", targets[0])):
            targets = targets[0]  # PEFT's shorthand or a regular expression, which a command line makes a list of
        more = self.lora_kwargs or {}
        try:
            # A command line makes lists of texts, and texts of JSON
            more = json.loads(more) if isinstance(more, str) else more
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=self.lora_r,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules=targets,
                modules_to_save=self.lora_modules_to_save,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                **more,
            )
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"lora_kwargs do not fit peft.LoraConfig: {error}") from error

    def quantization_config(self, compute_dtype: "torch.dtype") -> "BitsAndBytesConfig | None":
        """The [`~transformers.BitsAndBytesConfig`], None if nothing is quantized."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        if not self.use_peft:
            raise ValueError("load_in_4bit and load_in_8bit train nothing without use_peft")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
        )
