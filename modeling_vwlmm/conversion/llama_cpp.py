"""A VW-LMM model as llama.cpp reads it: the LLM in one GGUF file, its tower and projector in another."""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlavaProcessor

from ..configuration_vwlmm import VWLmmConfig
from ..files import new_folder
from ..weights import StoredTensor
from .checkpoint import Checkpoint, open_checkpoint, read_generation_config, read_processor
from .llava import stored_names, text_config_with_image_token, weights_with_image_token


LONGEST_MESSAGE = 500  # characters of what the converter says
LLM_FILE, MMPROJ_FILE = "model.gguf", "mmproj.gguf"
OUTPUT_TYPES = {None: "auto", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

# llama.cpp computes these alone: its default is quick_gelu, and its gelu is the one with tanh
GELU = {"quick_gelu": False, "gelu": True, "gelu_new": True, "gelu_pytorch_tanh": True}
# The class embedding, which SigLIP lacks, is left out
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
TOWER = "model.vision_tower."
MMPROJ_NAMES = {
    f"{TOWER}embeddings.class_embedding": "v.class_embd",
    f"{TOWER}embeddings.patch_embedding.": "v.patch_embd.",
    f"{TOWER}embeddings.position_embedding.": "v.position_embd.",
    f"{TOWER}pre_layrnorm.": "v.pre_ln.",
    "model.multi_modal_projector.linear_1.": "mm.0.",
    "model.multi_modal_projector.linear_2.": "mm.2.",
}
LAYER_NAMES = {
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.out_proj.": "attn_out.",
    "layer_norm1.": "ln1.",
    "layer_norm2.": "ln2.",
    "mlp.fc1.": "ffn_up.",
    "mlp.fc2.": "ffn_down.",
}


def convert_to_gguf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    converter: str | os.PathLike,
    dtype: torch.dtype | None = None,
) -> None:
    """Make `model.gguf`, the LLM, and `mmproj.gguf`, the vision tower with the projector, from a VW-LMM model.

    llama.cpp's own converter writes the LLM, with rows for the image token as in [`convert_to_llava`]. It writes no
    tower of a LLaVA, which is therefore written here, under the names that llama.cpp's `clip.cpp` looks up.

    Args:
        source, destination: as for [`convert`].
        converter: the `convert_hf_to_gguf.py` of a checkout of llama.cpp, which this runs.
        dtype: of the LLM's matrices, their own if not given. Those of the tower are in float32 if this is float32, in
            float16 otherwise; its convolution is in float16, vectors are in float32.

    Raises:
        ValueError: the model is no VW-LMM model, or llama.cpp cannot compute it, or does not know its tokenizer.
        ImportError: the `gguf` package is missing.
    """
    folder, raw = open_checkpoint(source)
    config = VWLmmConfig.from_dict(raw)
    processor = read_processor(folder)
    if reason := _cannot_run(config, processor):
        raise ValueError(f"{source} {reason}")
    if not Path(converter).is_file():
        raise FileNotFoundError(f"{converter}: no such file, expected the convert_hf_to_gguf.py of llama.cpp")
    if config.vision_config.model_type == "clip_vision_model":
        warnings.warn(
            "llama.cpp puts CLIP's class embedding behind the patches, its issue 25814: until that is mended, answers "
            "differ from those of this model",
            stacklevel=2,
        )
    tensors = weights_with_image_token(folder, config)
    with new_folder(destination) as unfinished:
        _write_mmproj(unfinished / MMPROJ_FILE, config, processor, tensors, dtype)
        with tempfile.TemporaryDirectory(dir=unfinished) as beside:
            llm = Path(beside) / "llm"
            _llm(folder, config, processor, tensors).save(llm, None)
            _run(converter, llm, unfinished / LLM_FILE, OUTPUT_TYPES[dtype])


def _cannot_run(config: VWLmmConfig, processor: LlavaProcessor | None) -> str | None:
    """Why llama.cpp would compute something else; None if it computes what the model does."""
    tower = config.vision_config
    if config.pseudo_image_features:
        return "reads pseudo image features, which take its VM head: llama.cpp has none"
    if tower.model_type not in TOWERS:
        return f"has a tower of type {tower.model_type}, expected one of llama.cpp's: {', '.join(TOWERS)}"
    if tower.hidden_act not in GELU or config.projector_hidden_act != "gelu":
        return (
            f"has a tower with {tower.hidden_act} and a projector with {config.projector_hidden_act}, "
            f"expected one of {', '.join(GELU)} and gelu"
        )
    if config.vision_feature_select_strategy != TOWERS[tower.model_type]:
        return (
            f'has vision_feature_select_strategy "{config.vision_feature_select_strategy}": of a {tower.model_type} '
            "llama.cpp leaves out the class embedding and nothing else"
        )
    if _feature_layers(config) != sorted(set(_feature_layers(config))):
        return f"reads the layers {config.vision_feature_layer} of its tower, which llama.cpp joins in ascending order"
    if tower.hidden_size == tower.intermediate_size:
        return "has a tower with an intermediate_size of its hidden_size, for which llama.cpp swaps its matrices"
    if processor is None:
        return "has no processor, whose tokenizer and mean colour llama.cpp needs"
    return None


def _feature_layers(config: VWLmmConfig) -> list[int]:
    """The layers that the features are read from, counted from 0, the input of the first."""
    layers = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers + 1
    return [layer % count for layer in (layers if isinstance(layers, (list, tuple)) else [layers])]


def _write_mmproj(
    path: Path,
    config: VWLmmConfig,
    processor: LlavaProcessor,
    tensors: dict[str, StoredTensor],
    dtype: torch.dtype | None,
) -> None:
    import gguf

    tower, layers = config.vision_config, _feature_layers(config)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_vision_use_gelu(GELU[tower.hidden_act])
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
    writer.add_vision_block_count(max(layers))  # those behind are not computed
    writer.add_array("clip.vision.feature_layer", layers)
    matrices = torch.float32 if dtype == torch.float32 else torch.float16
    for name, tensor in tensors.items():
        stored_as = _mmproj_name(name, max(layers))
        if stored_as is None:
            continue
        weight = tensor.read()
        if stored_as == "v.patch_embd.weight":  # ggml's convolution takes float16
            weight = weight.to(torch.float16)
        else:
            weight = weight.to(matrices if weight.dim() == 2 and ".position_embd." not in stored_as else torch.float32)
        writer.add_tensor(stored_as, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _mmproj_name(name: str, layers: int) -> str | None:
    """The name that llama.cpp has for a tensor; None for one that it does not read."""
    for ours, theirs in MMPROJ_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    layer, _, rest = name.removeprefix(f"{TOWER}encoder.layers.").partition(".")
    for ours, theirs in LAYER_NAMES.items():
        if layer.isdecimal() and int(layer) < layers and rest.startswith(ours):
            return f"v.blk.{layer}.{theirs}{rest.removeprefix(ours)}"
    return None


def _llm(folder: Path, config: VWLmmConfig, processor: LlavaProcessor, tensors: dict[str, StoredTensor]) -> Checkpoint:
    """The LLM with its tokenizer, as transformers saves it."""
    text_config = type(config.text_config).from_dict(text_config_with_image_token(config))
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config)
    prefix, own = "model.language_model.", f"{llm.base_model_prefix}."
    tensors = {
        name.replace(prefix, own): tensor for name, tensor in tensors.items() if name.startswith((prefix, "lm_head."))
    }
    text_config.architectures = [type(llm).__name__]
    return Checkpoint(text_config, stored_names(tensors, llm, folder), processor, read_generation_config(folder))


def _run(converter: str | os.PathLike, llm: Path, output: Path, output_type: str) -> None:
    command = [sys.executable, os.fspath(converter), os.fspath(llm), "--outfile", os.fspath(output)]
    run = subprocess.run([*command, "--outtype", output_type], capture_output=True, encoding="utf-8", errors="replace")
    if run.returncode or not (output.is_file() and output.stat().st_size):
        lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
        said = "".join(character for character in lines[-1][:LONGEST_MESSAGE] if character.isprintable())
        raise ValueError(f"{converter} did not convert the LLM: {said}")
