"""The pieces that a model folder is made of, for every conversion to read, complete or save."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_vwlmm import VWLmmConfig
from ..files import check_whole, new_folder, read_json_object, reading, remove_code
from ..known_fields import check_fields
from ..modeling_vwlmm import VWLmmForCausalLM, VWLmmMultiModalProjector
from ..training_run import write_training_run
from ..weights import StoredTensor, check_weights, stored, write_weights


# Old versions of transformers saved these constants, which a model computes itself
RECOMPUTED = re.compile(r"(\.rotary_emb\.inv_freq|\.embeddings\.position_ids)$")
CLIP_L_336 = "openai/clip-vit-large-patch14-336"


@dataclass
class Checkpoint:
    """All that a folder of a model is made of, before it is written; `stages_before` are those it has been through."""

    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    processor: LlavaProcessor | None
    generation_config: GenerationConfig
    stages_before: tuple[str, ...] = ()

    def save(
        self, destination: str | os.PathLike, dtype: torch.dtype | None, made_of: list[str] | None = None
    ) -> None:
        """Write the folder, whole or not at all.

        Args:
            destination: the folder, which must not exist.
            dtype: of the weights that are written, their own if not given.
            made_of: what a record of the conversion names as its sources. There is no record if not given.
        """
        with new_folder(destination) as folder:
            write_weights(folder, self.tensors, dtype)
            llm = [name for name in self.tensors if "language_model" in name] or list(self.tensors)
            dtypes = {self.tensors[name].meta.dtype for name in llm}
            self.config.architectures = self.config.architectures or [VWLmmForCausalLM.__name__]
            self.config.dtype = dtype or max(dtypes, key=lambda dtype: dtype.itemsize)
            self.generation_config.save_pretrained(folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            self.config.save_pretrained(folder)
            remove_code(folder)
            if made_of is not None:
                record = {"stage": "convert", "base_model": made_of, "stages_before": list(self.stages_before)}
                write_training_run(folder, [{**record, "recipe": {"output_dir": os.fspath(destination)}}])


def open_checkpoint(source: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, downloaded if `source` is a repository, and its config as the JSON has it."""
    folder = Path(source)
    if not folder.is_dir():
        files = ["*.json", "*.model", "*.jinja"]
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.safetensors"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.bin"]))
        except HFValidationError as error:
            raise FileNotFoundError(f"{source}: no such folder") from error
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(f"{source} is no folder, and no repository that can be reached") from error
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the folder of a checkpoint")
    check_tokenizer_files(folder)
    check_fields(folder)
    return folder, read_json_object(path)


def check_tokenizer_files(folder: str | os.PathLike) -> None:
    """`ValueError` if a file of a tokenizer has no content, of which transformers may make an empty vocabulary."""
    for name in ("tokenizer.model", "spiece.model", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        if (Path(folder) / name).is_file():
            check_whole(Path(folder) / name)


def fitting_weights(
    tensors: dict[str, StoredTensor],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: str | os.PathLike,
) -> dict[str, StoredTensor]:
    """The tensors without those that are tied to others; `ValueError` if they do not fit the model of the config."""
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    for tied in model.all_tied_weights_keys:
        expected.pop(tied, None)
        tensors.pop(tied, None)
    check_weights(tensors, expected, folder)
    return tensors


def add_new_parts(tensors: dict[str, StoredTensor], config: VWLmmConfig, vm_head: str, seed: int) -> None:
    """Add a projector and a VM head to `tensors` if they have none."""
    if vm_head not in ("random", "lm_head"):
        raise ValueError(f'vm_head is "{vm_head}", expected "random" or "lm_head"')
    with torch.device("meta"):
        model = VWLmmForCausalLM(config)
    embeddings = tensors[embeddings_name(model)]
    dtype = embeddings.meta.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, nn.Module] = {
            "model.multi_modal_projector.": VWLmmMultiModalProjector(config),
            "model.vm_head.": nn.Linear(config.text_config.hidden_size, config.visual_vocab_size, bias=False),
        }
        for prefix, part in parts.items():
            if not any(name.startswith(prefix) for name in tensors):
                part.apply(model._init_weights)
                tensors.update(with_prefix(prefix, part.to(dtype).state_dict(), "new"))
    if vm_head == "lm_head":
        lm_head = tensors.get("lm_head.weight", embeddings)
        tensors["model.vm_head.weight"] = StoredTensor(
            lm_head.meta[: config.visual_vocab_size],
            # A copy: safetensors refuses tensors that share their memory
            lambda: lm_head.read()[: config.visual_vocab_size].clone(),
            lm_head.source,
        )


def embeddings_name(model: PreTrainedModel) -> str:
    """The name that a model has for the weight of its LLM's input embeddings."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def with_prefix(
    prefix: str, state_dict: dict[str, torch.Tensor], source: str | os.PathLike
) -> dict[str, StoredTensor]:
    """The tensors of a part under their names in the whole model."""
    return stored({f"{prefix}{name}": tensor for name, tensor in state_dict.items()}, str(source))


def vision_tower_weights(vision_tower: str | os.PathLike, vision_config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """The weights of a vision tower under their names in the whole model."""
    with reading(vision_tower):
        tower = AutoModel.from_pretrained(vision_tower, config=vision_config, dtype="auto", trust_remote_code=False)
    return with_prefix("model.vision_tower.", tower.state_dict(), vision_tower)


def read_vision_tower(vision_tower: str | os.PathLike) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of a vision tower and the fields of its image processor, `image_mean` and `image_std` among them.

    The tower of LLaVA-1.5 is known, so that its repository need not be reached.
    """
    if vision_tower == CLIP_L_336 and not Path(vision_tower).is_dir():
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        return config, {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    with reading(f"the config of {vision_tower}"):
        config = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False)
    config = getattr(config, "vision_config", config)  # CLIP and SigLIP have a text model beside it
    about_the_folder = ("_name_or_path", "architectures", "dtype", "transformers_version")
    fields = {name: value for name, value in config.to_dict().items() if name not in about_the_folder}
    with reading(f"the config of {vision_tower}"):
        config = type(config).from_dict(fields)
        pixels, _ = BaseImageProcessor.get_image_processor_dict(vision_tower)
    return config, pixels


def read_processor(folder: Path) -> LlavaProcessor | None:
    """The processor of a folder, None if it has none."""
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    with reading(f"the processor of {folder}"):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def read_generation_config(folder: Path) -> GenerationConfig:
    """The generation config of a folder, which transformers can save again."""
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    with reading(folder / "generation_config.json"):
        config = GenerationConfig.from_pretrained(folder)
    if not config.do_sample:
        # Without sampling these fields do nothing, but transformers refuses to save a config that has them
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
    return config
