"""Conversion between VW-LMM models and the LLaVA checkpoints of transformers."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..configuration_vwlmm import VWLmmConfig
from ..files import reading
from ..modeling_vwlmm import VWLmmForCausalLM
from ..weights import StoredTensor, read_weights, stored
from .checkpoint import (
    RECOMPUTED,
    Checkpoint,
    add_new_parts,
    embeddings_name,
    fitting_weights,
    open_checkpoint,
    read_generation_config,
    read_processor,
)


def from_llava(folder: Path, vm_head: str, seed: int) -> Checkpoint:
    """The VW-LMM model that a LLaVA checkpoint of transformers becomes. `vm_head`, `seed`: as for [`convert`]."""
    with reading(f"the config of {folder}"), torch.device("meta"):
        llava_config = LlavaConfig.from_pretrained(folder)
        llava = LlavaForConditionalGeneration(llava_config)
    mapping = get_model_conversion_mapping(llava)
    tensors = {name: tensor for name, tensor in read_weights(folder).items() if not RECOMPUTED.search(name)}
    tensors = {_rename(name, mapping): tensor for name, tensor in tensors.items()}
    if None in tensors:  # transformers merges several tensors into one (experts), which takes the whole model
        llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        tensors = stored(llava.state_dict(), str(folder))
    tensors = fitting_weights(tensors, LlavaForConditionalGeneration, llava_config, folder)
    processor = read_processor(folder)
    fields = {name: getattr(llava_config, name) for name in LlavaConfig.__annotations__ if name != "model_type"}
    config = VWLmmConfig(
        **fields,
        image_aspect_ratio="pad" if processor is not None and _pads(processor.image_processor) else "crop",
        visual_vocab_size=_own_vocab_size(llava_config, processor),
    )
    if processor is not None and processor.patch_size is None:  # the first LLaVA checkpoints have none
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_feature_select_strategy == "default")
    add_new_parts(tensors, config, vm_head, seed)
    return Checkpoint(config, tensors, processor, read_generation_config(folder), ("align", "instruct"))


def convert_to_llava(
    source: str | os.PathLike, destination: str | os.PathLike, dtype: torch.dtype | None = None
) -> None:
    """Make a LLaVA checkpoint, as transformers and other runtimes read it, from a VW-LMM model without its VM head.

    LLaVA looks up the embedding of the image token. If that token lies beyond the LLM's vocabulary, the embeddings and
    the head get rows up to it. Each is the mean of the others, with which a token is never the most probable.

    Args: as for [`convert`].

    Raises:
        ValueError: the model is no VW-LMM model, or reads pseudo image features, which LLaVA cannot make.
    """
    folder, raw = open_checkpoint(source)
    config = VWLmmConfig.from_dict(raw)
    if config.pseudo_image_features:
        raise ValueError(f"{source} reads pseudo image features, which take its VM head: LLaVA has none")
    fields = {name: value for name, value in config.to_dict().items() if name in LlavaConfig.__annotations__}
    llava_config = LlavaConfig(
        **{**fields, "text_config": text_config_with_image_token(config), "image_token_id": config.image_token_id}
    )

    tensors = weights_with_image_token(folder, config)
    del tensors["model.vm_head.weight"]
    try:
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(llava_config)
    except AttributeError as error:  # LLaVA asks for the hidden_size of its tower
        raise ValueError(
            f"{source}: transformers' LLaVA takes no tower of type {config.vision_config.model_type}"
        ) from error
    tensors = stored_names(tensors, llava, source)
    llava_config.architectures = ["LlavaForConditionalGeneration"]
    Checkpoint(llava_config, tensors, read_processor(folder), read_generation_config(folder)).save(destination, dtype)


def text_config_with_image_token(config: VWLmmConfig) -> dict[str, Any]:
    """The fields of the LLM's config, with a vocabulary that reaches to the image token."""
    vocab_size = max(config.text_config.vocab_size, config.image_token_id + 1)
    return {**config.text_config.to_dict(), "vocab_size": vocab_size}


def weights_with_image_token(folder: Path, config: VWLmmConfig) -> dict[str, StoredTensor]:
    """The weights of a VW-LMM model, with rows for the image token: [`convert_to_llava`] says which."""
    tensors = fitting_weights(read_weights(folder), VWLmmForCausalLM, config, folder)
    with torch.device("meta"):
        embeddings = embeddings_name(VWLmmForCausalLM(config))
    rows = text_config_with_image_token(config)["vocab_size"]
    return {
        name: _with_rows(tensor, rows) if name in (embeddings, "lm_head.weight") else tensor
        for name, tensor in tensors.items()
    }


def stored_names(
    tensors: dict[str, StoredTensor], model: PreTrainedModel, source: str | os.PathLike
) -> dict[str, StoredTensor]:
    """The tensors under the names that transformers gives them when it saves the model."""
    mapping = [step.reverse_transform() for step in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    named = {_rename(name, mapping, reverse=True): tensor for name, tensor in tensors.items()}
    if None in named:
        text_type = model.config.get_text_config().model_type
        raise ValueError(f"{source}: the experts of a {text_type} are stored in another form, not supported")
    return named


def _pads(image_processor: Any) -> bool:
    return bool(getattr(image_processor, "do_pad", False))


def _own_vocab_size(config: LlavaConfig, processor: Any) -> int:
    """The size of the vocabulary that the LLM came with, before an image token and rows after it were added."""
    vocab_size, image_token_id = config.text_config.vocab_size, config.image_token_id
    is_added = processor is None or image_token_id >= processor.tokenizer.vocab_size
    return min(vocab_size, image_token_id) if is_added else vocab_size


def _rename(name: str, mapping: list, reverse: bool = False) -> Any:
    """The name that transformers gives a stored tensor; None if it makes the tensor into another one."""
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    name, converted = rename_source_key(name, renamings, converters, reverse=reverse)
    return name if converted is None else None


def _with_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The tensor with as many rows. Those that are added are the mean of its own."""
    missing = rows - tensor.meta.shape[0]

    def read() -> torch.Tensor:
        found = tensor.read()
        mean = found.float().mean(0, keepdim=True).to(found.dtype)
        return torch.cat([found, mean.expand(missing, -1)])

    return StoredTensor(
        torch.empty(rows, *tensor.meta.shape[1:], dtype=tensor.meta.dtype, device="meta"), read, tensor.source
    )
