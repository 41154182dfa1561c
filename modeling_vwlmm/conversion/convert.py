"""The making of VW-LMM models from the checkpoints of others."""

import os
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..configuration_vwlmm import VWLmmConfig
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import IMAGE_MARKER, make_processor, read_chat_template
from .checkpoint import (
    Checkpoint,
    add_new_parts,
    check_tokenizer_files,
    fitting_weights,
    open_checkpoint,
    read_vision_tower,
    vision_tower_weights,
    with_prefix,
)
from .llava import from_llava
from .published import from_published


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    variant: str | None = None,
    vm_head: str = "random",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Make a VW-LMM model from a published VW-LMM checkpoint or from a LLaVA checkpoint.

    Weights keep their values and, unless `dtype` is given, their dtype. They are read and written one by one.

    Args:
        source: folder or repository of a checkpoint in one of three layouts: VW-LMM's published one, the original
            LLaVA-1.5's, which is the same without a VM head, or transformers' LLaVA.
        destination: the folder to write, which must not exist.
        vision_tower: folder or repository of the vision tower of a published checkpoint. Its config and preprocessor
            are read, and its weights if the checkpoint has none. The checkpoint's own `mm_vision_tower` if not given.
        variant: of a published checkpoint, a key of `VARIANTS`. The checkpoint's config says it if not given.
        vm_head: how a VM head starts if the checkpoint has none: `"random"`, or `"lm_head"` for a copy of the LLM's
            head.
        seed: of the parts that start at random.
        dtype: of the weights that are written.

    Raises:
        ValueError: the checkpoint is in another layout, or its files do not fit together.
        OSError: files are missing, or the destination exists.
    """
    folder, raw = open_checkpoint(source)
    if raw.get("model_type") == "vwlmm":
        raise ValueError(f"{source} is a VW-LMM model already")
    if "mm_vision_tower" in raw:
        checkpoint = from_published(folder, raw, vision_tower, variant, vm_head, seed)
    elif raw.get("model_type") == "llava":
        if vision_tower or variant:
            raise ValueError(f"{source} is a LLaVA checkpoint of transformers: its config says all, give no more")
        checkpoint = from_llava(folder, vm_head, seed)
    else:
        raise ValueError(
            f'{folder / "config.json"}: found a model of type "{raw.get("model_type")}", expected a published VW-LMM '
            "or LLaVA-1.5 checkpoint (with mm_vision_tower) or transformers' LLaVA"
        )
    checkpoint.save(destination, dtype, [os.fspath(name) for name in (source, vision_tower) if name])


def combine(
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    destination: str | os.PathLike,
    vm_head: str = "random",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    vision_feature_layer: int | list[int] = -2,
) -> None:
    """Make a VW-LMM model for stage 1 to start from, of an LLM and a vision tower that were never trained together.

    Args:
        language_model: folder or repository of any LLM of transformers, or a GGUF file.
        vision_tower: folder or repository of a vision model, which may be part of a CLIP or SigLIP.
        destination, vm_head, seed, dtype: as for [`convert`].
        vision_feature_layer: which hidden states of the tower become patches; several are put side by side. LLaVA
            reads the last but one of CLIP.
    """
    where, options = language_model, {}
    if str(language_model).endswith(".gguf"):
        where, options = os.path.dirname(language_model) or ".", {"gguf_file": os.path.basename(language_model)}
    check_tokenizer_files(where)
    llm = AutoModelForCausalLM.from_pretrained(where, dtype="auto", trust_remote_code=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_chat_template("vicuna_v1")
    vision_config, pixels = read_vision_tower(vision_tower)
    text_config = llm.config.get_text_config()
    if "gguf_file" in options:
        # transformers has dequantized the weights, but would train no model whose config says otherwise
        vars(text_config).pop("quantization_config", None)
    config = VWLmmConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.get_vocab().get(IMAGE_MARKER, len(tokenizer)),
        visual_vocab_size=min(len(tokenizer), text_config.vocab_size),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=_select_strategy(vision_config, text_config, vision_feature_layer),
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    tensors = {
        **with_prefix("model.language_model.", llm.base_model.state_dict(), language_model),
        **with_prefix("lm_head.", llm.get_output_embeddings().state_dict(), language_model),
        **vision_tower_weights(vision_tower, vision_config),
    }
    add_new_parts(tensors, config, vm_head, seed)
    tensors = fitting_weights(tensors, VWLmmForCausalLM, config, language_model)
    processor = make_processor(config, tokenizer, pixels["image_mean"], pixels["image_std"])
    made_of = [os.fspath(language_model), os.fspath(vision_tower)]
    Checkpoint(config, tensors, processor, llm.generation_config).save(destination, dtype, made_of)


def _select_strategy(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, vision_feature_layer: int | list[int]
) -> Literal["default", "full"]:
    """ "full" for a tower whose tokens are its patches, "default" for one with a CLS token before them."""
    config = VWLmmConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
    )
    # A feature map, which is not cut into squares, has no CLS token
    return "full" if config.squares() in (None, config.image_seq_length) else "default"


__all__ = ["combine", "convert"]
