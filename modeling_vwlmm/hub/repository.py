"""Makes the repository of a model in a folder of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..configuration_vwlmm import VWLmmConfig
from ..files import new_folder, read_json, read_json_object, without_code, write_json
from ..modeling_vwlmm import VWLmmForCausalLM
from ..weights import read_weights, write_weights
from . import load_check
from .card_pictures import EXAMPLE_SUFFIXES, EXAMPLES
from .notes import has_notes, remove_notes
from .redaction import holds_token, private_place, without_home, without_paths, without_secrets


LARGEST_FILE = 5 * 10**9  # bytes; a broken upload sends its current file again, so that files stay small
AUTO_MAP = {
    "AutoConfig": "configuration_vwlmm.VWLmmConfig",
    "AutoModel": "modeling_vwlmm.VWLmmModel",
    "AutoModelForCausalLM": "modeling_vwlmm.VWLmmForCausalLM",
    "AutoModelForImageTextToText": "modeling_vwlmm.VWLmmForCausalLM",
    "AutoModelForMultimodalLM": "modeling_vwlmm.VWLmmForCausalLM",
}
# What goes into a repository beside the weights: these names and no others, for `wandb_config.json` may hold a key.
# Configs and logs are rewritten, for they may name places
CONFIGS = [
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
]
LOGS = ["training_run.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"]
VERBATIM = [
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for suffix in ("", ".md", ".txt")),
    *(f"{EXAMPLES}/*{suffix}" for suffix in EXAMPLE_SUFFIXES),
    *("README.md", "assets/losses.json", "assets/limits.png"),
]


def _find(folder: Path, patterns: list[str]) -> list[Path]:
    """The files of these names; `ValueError` if one is a link to a file of another place, which a push would send."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    own = [
        folder.resolve(),
        Path(constants.HF_HUB_CACHE).resolve(),
    ]  # a folder of the Hub's cache is one of links into it
    for file in files:
        if not any(file.resolve().is_relative_to(place) for place in own):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside of {folder}: replace it by a copy")
    return files


class ModelFolder(NamedTuple):
    """What `read_folder` found: a model with its config, or an adapter with the name of its base model."""

    folder: Path
    config: VWLmmConfig | None
    trained_on: str | None


def read_folder(folder: str | os.PathLike) -> ModelFolder:
    """Find the model or adapter in a folder.

    Raises:
        FileNotFoundError: there is no folder, no config, no weights or no processor.
        ValueError: it is not a VW-LMM model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder, expected one that `vwlmm train` or `vwlmm convert` wrote")
    config = trained_on = None
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        trained_on = read_json_object(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        if not trained_on:
            raise ValueError(f"{folder / ADAPTER_CONFIG_NAME} names no base model")
        if not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{folder} has no weights, expected {ADAPTER_SAFE_WEIGHTS_NAME}")
    else:
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{folder} has no model, expected {CONFIG_NAME} or {ADAPTER_CONFIG_NAME}")
        model_type = read_json_object(folder / CONFIG_NAME).get("model_type")
        VWLmmConfig.get_config_dict(folder)  # names `vwlmm convert` if it is a LLaVA's
        if model_type != VWLmmConfig.model_type:
            raise ValueError(f'{folder} has a model of type "{model_type}", expected "{VWLmmConfig.model_type}"')
        config = VWLmmConfig.from_pretrained(folder)
        read_weights(folder)
    if not _find(folder, ["processor_config.json", "preprocessor_config.json"]):
        raise FileNotFoundError(f"{folder} has no processor, expected processor_config.json")
    return ModelFolder(folder, config, trained_on)


def export_with_code(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Make a copy of a model with the code that computes it, which loads without this package.

    It does so with `trust_remote_code=True`, as a repository on the Hub does that `vwlmm push` made.

    Args:
        source: folder of the model.
        destination: the folder to write, which must not exist.

    Raises:
        FileExistsError: the destination is there.
        ValueError: it is an adapter, or no VW-LMM model.
    """
    found = read_folder(source)
    if found.config is None:
        raise ValueError(f"{source} is an adapter: vwlmm merge {source} FOLDER makes a model of it")
    with new_folder(destination) as folder:
        fill_repository(found.folder, folder, place=shutil.copyfile)


def fill_repository(
    folder: Path, into: Path, base_model: str | None = None, place: Callable[[Path, Path], Any] | None = None
) -> None:
    """Fill a new folder with what belongs into the repository of a model. The weights become links to the model's.

    The logs keep their paths at first, because the card finds the folders of earlier stages by them. `make_harmless`
    shortens them.

    Args:
        base_model (`str`, *optional*): the name that an adapter's config gets for its base model.
        place (`Callable`, *optional*): puts a file of weights at a path in place of a link.
    """
    place = place or _link
    into.mkdir(exist_ok=True)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        left_out = {CONFIG_NAME, "generation_config.json"}
        for file in _find(folder, [ADAPTER_SAFE_WEIGHTS_NAME]):
            if has_notes(file):
                save_file(load_file(file), into / file.name, metadata={"format": "pt"})
            else:
                place(file, into / file.name)
    else:
        left_out = set()
        tensors = read_weights(folder)
        files = _find(folder, sorted({tensor.source for tensor in tensors.values()}))
        files += _find(folder, [SAFE_WEIGHTS_INDEX_NAME])
        if not any(file.suffix == ".bin" or file.stat().st_size > LARGEST_FILE or has_notes(file) for file in files):
            for file in files:
                place(file, into / file.name)
        else:
            write_weights(into, tensors)
        custom_object_save(VWLmmForCausalLM, into)
    for file in _find(folder, CONFIGS):
        if file.name in left_out:
            continue
        content = without_code(without_paths(read_json_object(file), is_log=False))
        if file.name == CONFIG_NAME:
            content["auto_map"] = AUTO_MAP
        if file.name == ADAPTER_CONFIG_NAME and base_model is not None:
            content["base_model_name_or_path"] = base_model
        write_json(into / file.name, content)
    for file in _find(folder, LOGS):
        write_json(into / file.name, without_secrets(read_json(file)))
    for file in _find(folder, VERBATIM):
        (into / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, into / file.relative_to(folder))
        if file.parent.name == EXAMPLES:
            remove_notes(into / file.relative_to(folder))


def _link(file: Path, path: Path) -> None:
    try:
        os.link(file.resolve(), path)
    except OSError:  # another file system
        os.symlink(file.resolve(), path)


def make_harmless(staged: Path, name: str | os.PathLike, token: str | None) -> None:
    """Shorten the paths in the logs and the card of a staged folder, and look through what is sent as it is.

    Args:
        name (`str` or `os.PathLike`): what the error message calls the folder.
        token (`str`, *optional*): the token that the push is made with.

    Raises:
        ValueError: a file holds a token, password or key, or a chat template a path of a home folder.
    """
    for file in _find(staged, LOGS):
        write_json(file, without_paths(read_json(file), is_log=True))
    card = staged / "README.md"
    card.write_text(without_home(card.read_text(encoding="utf-8")), encoding="utf-8")
    for file in sorted(path for path in staged.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        if holds_token(file.read_bytes().decode(errors="replace"), token):
            raise ValueError(f"{file.relative_to(staged)} would hold a token or password: remove it from {name}")
    for file in sorted([*staged.rglob("*.jinja"), *staged.glob("chat_template.json")]):
        if place := private_place(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file.relative_to(staged)} would name {place}: remove it from {name}")


def check_loads(staged: Path, name: str | os.PathLike, base: Path | None = None) -> None:
    """Load a staged folder on the CPU in two new processes, one with this package and one without it.

    Args:
        name (`str` or `os.PathLike`): what error messages call the folder.
        base (`Path`, *optional*): the staged base model of an adapter.

    Raises:
        ValueError: it does not load, or computes something else without this package.
    """
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        output = os.path.join(scratch, "output")
        on_base = [] if base is None else ["--base", str(base)]
        bare = ["--bare", "pillow", *([] if base is None else ["peft"])]
        for how, switches in tqdm([("", []), (" without this package", bare)], desc="Loading", disable=None):
            run = subprocess.run(
                [sys.executable, load_check.__file__, str(staged), output, *on_base, *switches],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if run.returncode:
                reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"status {run.returncode}"
                raise ValueError(f"{name} does not load{how}: {reason.replace(str(staged), str(name))}")
            results.append(load_file(output))
    for key, expected in results[0].items():
        if not torch.allclose(results[1][key], expected, rtol=1e-3, atol=1e-4):
            raise ValueError(f"{name}: another {key} without this package than with it")
