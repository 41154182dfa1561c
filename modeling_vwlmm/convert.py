"""Checkpoints of others become VW-LMM models, and VW-LMM models LLaVA checkpoints."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_vwlmm import VWLmmConfig
from .data import read_chat_template
from .modeling_vwlmm import VWLmmForCausalLM, VWLmmMultiModalProjector
from .processing import IMAGE_TOKEN, make_processor
from .published import find_variant, published_name, published_tokenizer, read_text_config
from .training_run import write_training_run
from .weights import StoredTensor, check_weights, new_folder, read_weights, stored, write_weights


# Constants that old versions of transformers saved
RECOMPUTED = re.compile(r"(\.rotary_emb\.inv_freq|\.embeddings\.position_ids)$")
CLIP_L_336 = "openai/clip-vit-large-patch14-336"


@dataclass
class Checkpoint:
    """All that a folder of a model is made of."""

    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    processor: LlavaProcessor | None
    generation_config: GenerationConfig

    def save(self, destination, dtype, made_of=None):
        with new_folder(destination) as folder:
            write_weights(folder, self.tensors, dtype)
            dtypes = {tensor.meta.dtype for name, tensor in self.tensors.items() if "language_model" in name}
            self.config.dtype = dtype or max(dtypes, key=lambda dtype: dtype.itemsize)
            self.generation_config.save_pretrained(folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            self.config.save_pretrained(folder)
            if made_of is not None:
                recipe = {"output_dir": os.fspath(destination)}
                write_training_run(folder, [{"stage": "convert", "base_model": made_of, "recipe": recipe}])


def convert(source, destination, vision_tower=None, variant=None, vm_head="random", seed=0, dtype=None):
    """Make a VW-LMM model of a published VW-LMM checkpoint or of a LLaVA checkpoint.

    Weights keep their values and, unless `dtype` is given, their dtype. They are read and written one by one.

    Args:
        source (`str`): folder or repository of a checkpoint, in one of three layouts: VW-LMM's published one, the
            original LLaVA-1.5's, which is the same without a VM head, and transformers' LLaVA.
        destination (`str`): the folder to write, which must not exist.
        vision_tower (`str`, *optional*): folder or repository of the vision tower of a published checkpoint, for its
            config and preprocessor, and for its weights where the checkpoint has none. The one that the checkpoint's
            `mm_vision_tower` names if not given.
        variant (`str`, *optional*): of a published checkpoint, a key of `VARIANTS`. Found in its config if not given.
        vm_head (`str`, *optional*, defaults to `"random"`): how a VM head starts where the checkpoint has none,
            `"random"` or `"lm_head"`, a copy of the LLM's.
        seed (`int`, *optional*, defaults to 0): of what starts at random.
        dtype (`torch.dtype`, *optional*): of the weights that are written.

    Raises:
        ValueError: the checkpoint is in another layout, or its files do not fit together.
        OSError: files are missing, or the destination exists.
    """
    folder, raw = _open_checkpoint(source)
    if raw.get("model_type") == "vwlmm":
        raise ValueError(f"{source} is a VW-LMM model already")
    if "mm_vision_tower" in raw:
        checkpoint = _from_published(folder, raw, vision_tower, variant, vm_head, seed)
    elif raw.get("model_type") == "llava":
        if vision_tower or variant:
            raise ValueError(f"{source} is a LLaVA checkpoint of transformers: its config says all, give no more")
        checkpoint = _from_llava(folder, vm_head, seed)
    else:
        raise ValueError(
            f'{folder / "config.json"}: found a model of type "{raw.get("model_type")}", expected a published VW-LMM '
            "or LLaVA-1.5 checkpoint (with mm_vision_tower) or transformers' LLaVA"
        )
    checkpoint.save(destination, dtype, [os.fspath(name) for name in (source, vision_tower) if name])


def convert_to_llava(source, destination, dtype=None):
    """Make a LLaVA checkpoint, as transformers and other runtimes read it, of a VW-LMM model: without its VM head.

    Where the image token lies beyond the LLM's vocabulary, embeddings and head get rows up to it, which LLaVA looks
    up: the mean of the others, with which a token is never the most probable.

    Args: as for [`convert`].

    Raises:
        ValueError: the model is another one, or reads pseudo image features, which LLaVA cannot make.
    """
    folder, raw = _open_checkpoint(source)
    config = VWLmmConfig.from_dict(raw)
    if config.pseudo_image_features:
        raise ValueError(f"{source} reads pseudo image features, which take its VM head: LLaVA has none")
    text_config = config.text_config.to_dict()
    text_config["vocab_size"] = max(config.text_config.vocab_size, config.image_token_id + 1)
    fields = {name: value for name, value in config.to_dict().items() if name in LlavaConfig.__annotations__}
    llava_config = LlavaConfig(**{**fields, "text_config": text_config, "image_token_id": config.image_token_id})

    tensors = _checked(read_weights(folder), VWLmmForCausalLM, config, folder)
    del tensors["model.vm_head.weight"]
    with torch.device("meta"):
        embeddings = _embeddings_name(VWLmmForCausalLM(config))
    for name in (embeddings, "lm_head.weight"):
        if name in tensors:
            tensors[name] = _with_rows(tensors[name], text_config["vocab_size"])
    try:
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(llava_config)
    except AttributeError as error:  # it asks for the hidden_size of its tower
        raise ValueError(
            f"{source}: transformers' LLaVA takes no tower of type {config.vision_config.model_type}"
        ) from error
    mapping = [step.reverse_transform() for step in get_model_conversion_mapping(llava, add_legacy=False)[::-1]]
    tensors = {_rename(name, mapping, reverse=True): tensor for name, tensor in tensors.items()}
    if None in tensors:
        raise ValueError(
            f"{source}: the experts of a {config.text_config.model_type} are stored in another form, not supported"
        )
    llava_config.architectures = ["LlavaForConditionalGeneration"]
    Checkpoint(llava_config, tensors, _read_processor(folder), _read_generation_config(folder)).save(
        destination, dtype
    )


def combine(language_model, vision_tower, destination, vm_head="random", seed=0, dtype=None, vision_feature_layer=-2):
    """Make a VW-LMM model, for stage 1 to start from, of an LLM and a vision tower that never met.

    Args:
        language_model (`str`): folder or repository of any LLM of transformers, or a GGUF file.
        vision_tower (`str`): folder or repository of a vision model, alone or in a CLIP or SigLIP.
        destination, vm_head, seed, dtype: as for [`convert`].
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Which hidden states of the tower become patches. As in LLaVA the last but one layer if not given, which
            is meant for CLIP; several are put side by side.
    """
    where, options = language_model, {}
    if str(language_model).endswith(".gguf"):
        where, options = os.path.dirname(language_model) or ".", {"gguf_file": os.path.basename(language_model)}
    llm = AutoModelForCausalLM.from_pretrained(where, dtype="auto", **options)
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_chat_template("vicuna_v1")
    vision_config, pixels = _read_vision_tower(vision_tower)
    text_config = llm.config.get_text_config()
    if "gguf_file" in options:
        # Its weights have been dequantized: a config that says otherwise makes a model that cannot train
        vars(text_config).pop("quantization_config", None)
    config = VWLmmConfig(
        vision_config,
        text_config,
        image_token_index=tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer)),
        visual_vocab_size=min(len(tokenizer), text_config.vocab_size),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=_select_strategy(vision_config, text_config, vision_feature_layer),
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    tensors = {
        **_with_prefix("model.language_model.", llm.base_model.state_dict(), language_model),
        **_with_prefix("lm_head.", llm.get_output_embeddings().state_dict(), language_model),
        **_vision_tower_weights(vision_tower, vision_config),
    }
    _add_new_parts(tensors, config, vm_head, seed)
    tensors = _checked(tensors, VWLmmForCausalLM, config, language_model)
    processor = make_processor(config, tokenizer, pixels["image_mean"], pixels["image_std"])
    made_of = [os.fspath(language_model), os.fspath(vision_tower)]
    Checkpoint(config, tensors, processor, llm.generation_config).save(destination, dtype, made_of)


def _open_checkpoint(source):
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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no config: expected a JSON object")
    return folder, raw


def _from_published(folder, raw, vision_tower, variant, vm_head, seed):
    found = read_weights(folder)
    tensors = {published_name(name): found[name] for name in found if not RECOMPUTED.search(name)}
    has_vm_head = "model.vm_head.weight" in tensors
    kind = find_variant(folder, raw, has_vm_head, variant)
    tokenizer = published_tokenizer(folder)
    vision_tower = vision_tower or raw["mm_vision_tower"]
    vision_config, pixels = _read_vision_tower(vision_tower)
    if kind.pseudo_image_features and not has_vm_head:
        raise ValueError(f"{folder} has no VM head, which a model that reads pseudo image features needs")
    config = VWLmmConfig(
        vision_config,
        read_text_config(kind.text_config, raw),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        image_aspect_ratio="pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
        pseudo_image_features=kind.pseudo_image_features,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors.update(_vision_tower_weights(vision_tower, vision_config))
    if not has_vm_head:
        _add_new_parts(tensors, config, vm_head, seed)
    try:
        tensors = _checked(tensors, VWLmmForCausalLM, config, folder)
    except ValueError as error:
        if "vision_tower" in str(error):
            raise ValueError(f"{error} (vision tower: {vision_tower}; --vision-tower names another)") from error
        raise
    template = read_chat_template(kind.chat_template)
    processor = make_processor(config, tokenizer, pixels["image_mean"], pixels["image_std"], template)
    return Checkpoint(config, tensors, processor, _read_generation_config(folder))


def _from_llava(folder, vm_head, seed):
    llava_config = LlavaConfig.from_pretrained(folder)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config)
    mapping = get_model_conversion_mapping(llava)
    tensors = {name: tensor for name, tensor in read_weights(folder).items() if not RECOMPUTED.search(name)}
    tensors = {_rename(name, mapping): tensor for name, tensor in tensors.items()}
    if None in tensors:  # of several tensors one is made (experts): that takes the whole model
        llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        tensors = stored(llava.state_dict(), str(folder))
    tensors = _checked(tensors, LlavaForConditionalGeneration, llava_config, folder)
    processor = _read_processor(folder)
    fields = {name: getattr(llava_config, name) for name in LlavaConfig.__annotations__ if name != "model_type"}
    config = VWLmmConfig(
        **fields,
        image_aspect_ratio="pad" if processor is not None and _pads(processor.image_processor) else "crop",
        visual_vocab_size=_own_vocab_size(llava_config, processor),
    )
    if processor is not None and processor.patch_size is None:  # of the first LLaVA checkpoints
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_feature_select_strategy == "default")
    _add_new_parts(tensors, config, vm_head, seed)
    return Checkpoint(config, tensors, processor, _read_generation_config(folder))


def _pads(image_processor):
    return bool(getattr(image_processor, "do_pad", False))


def _own_vocab_size(config, processor):
    """The vocabulary that the LLM came with: without an image token that was added, and the rows after it."""
    vocab_size, image_token_id = config.text_config.vocab_size, config.image_token_id
    is_added = processor is None or image_token_id >= processor.tokenizer.vocab_size
    return min(vocab_size, image_token_id) if is_added else vocab_size


def _rename(name, mapping, reverse=False):
    """The name that transformers gives a stored tensor; None if it makes another tensor of it."""
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    name, converted = rename_source_key(name, renamings, converters, reverse=reverse)
    return name if converted is None else None


def _checked(tensors, model_class, config, folder):
    """The tensors that the model of a config saves; a tied head is its embeddings."""
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    for tied in model.all_tied_weights_keys:
        expected.pop(tied, None)
        tensors.pop(tied, None)
    check_weights(tensors, expected, folder)
    return tensors


def _add_new_parts(tensors, config, vm_head, seed):
    """A projector and a VM head to `tensors`, where they have none."""
    if vm_head not in ("random", "lm_head"):
        raise ValueError(f'vm_head is "{vm_head}", expected "random" or "lm_head"')
    with torch.device("meta"):
        model = VWLmmForCausalLM(config)
    embeddings = tensors[_embeddings_name(model)]
    dtype = embeddings.meta.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"model.multi_modal_projector.": VWLmmMultiModalProjector(config)}
        head = nn.Linear(config.text_config.hidden_size, config.visual_vocab_size, bias=False)
        parts["model.vm_head."] = head
        for prefix, part in parts.items():
            if any(name.startswith(prefix) for name in tensors):
                continue
            part.apply(model._init_weights)
            tensors.update(_with_prefix(prefix, part.to(dtype).state_dict(), "new"))
    if vm_head == "lm_head":
        lm_head = tensors.get("lm_head.weight", embeddings)
        tensors["model.vm_head.weight"] = StoredTensor(
            lm_head.meta[: config.visual_vocab_size],
            # A copy: safetensors refuses tensors that share their memory
            lambda: lm_head.read()[: config.visual_vocab_size].clone(),
            lm_head.source,
        )


def _embeddings_name(model):
    """What a model calls the weight of its LLM's input embeddings."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _with_rows(tensor, rows):
    """The tensor with rows added, each the mean of its own, up to that many."""
    missing = rows - tensor.meta.shape[0]

    def read():
        found = tensor.read()
        mean = found.float().mean(0, keepdim=True).to(found.dtype)
        return torch.cat([found, mean.expand(missing, -1)])

    return StoredTensor(
        torch.empty(rows, *tensor.meta.shape[1:], dtype=tensor.meta.dtype, device="meta"), read, tensor.source
    )


def _with_prefix(prefix, state_dict, source):
    return stored({f"{prefix}{name}": tensor for name, tensor in state_dict.items()}, str(source))


def _vision_tower_weights(vision_tower, vision_config):
    tower = AutoModel.from_pretrained(vision_tower, config=vision_config, dtype="auto")
    return _with_prefix("model.vision_tower.", tower.state_dict(), vision_tower)


def _read_vision_tower(vision_tower):
    """The config of a vision tower and what its preprocessor says."""
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
    config = AutoConfig.from_pretrained(vision_tower)
    config = getattr(config, "vision_config", config)  # of a CLIP or a SigLIP, which have an LLM beside it
    about_the_folder = ("_name_or_path", "architectures", "dtype", "transformers_version")
    fields = {name: value for name, value in config.to_dict().items() if name not in about_the_folder}
    config = type(config).from_dict(fields)
    pixels, _ = BaseImageProcessor.get_image_processor_dict(vision_tower)
    return config, pixels


def _select_strategy(vision_config, text_config, vision_feature_layer):
    """ "full" for a tower whose tokens are its patches, "default" for one with a CLS token before them."""
    config = VWLmmConfig(
        vision_config,
        text_config,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
    )
    patch_size = getattr(vision_config, "patch_size", None)
    if not isinstance(patch_size, int):  # a feature map, which has no such token
        return "full"
    height, width = config.image_size
    return "full" if config.image_seq_length == (height // patch_size) * (width // patch_size) else "default"


def _read_processor(folder):
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    return AutoProcessor.from_pretrained(folder)


def _read_generation_config(folder):
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    config = GenerationConfig.from_pretrained(folder)
    if not config.do_sample:
        # Without sampling they do nothing, but transformers saves no such config
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
    return config


__all__ = ["combine", "convert", "convert_to_llava"]
