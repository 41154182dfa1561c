"""Pushes a model's folder to the Hub."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..configuration_vwlmm import VWLmmConfig
from ..weights import name_some
from .card import write_card
from .repository import ModelFolder, check_loads, fill_repository, make_harmless, read_folder


SCRATCH = "vwlmm-push-"
LOCK_NAME = ".lock"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ANY_WEIGHTS = re.compile(r"[^/]*\.(safetensors|bin|gguf|pt|pth|ckpt|h5|msgpack|onnx)")


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, token: str | None) -> Iterator[None]:
    """Raise what goes wrong on the way to the Hub as an `OSError` of one line without the token."""
    cause: Exception
    try:
        try:
            yield
            return
        except RuntimeError as error:  # huggingface_hub names the file here; what happened is the cause
            raise error.__cause__ or OSError(str(error)) from None
    except LocalTokenNotFoundError as error:
        cause, message = error, "there is no token: run `hf auth login`, or set HF_TOKEN"
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f": {error.server_message}" if error.server_message else ""
        cause, message = error, f"the Hub answered {status}{said}"
        if status == 401:
            message = f"the token is not valid{said}"
        elif status == 403:
            message = f"the token may not write there{said}"
        elif status in (409, 412):
            message = f"the repository has changed meanwhile{said}; push again"
        elif status == 429 or status >= 500:
            message += "; what has been sent is kept, push again to send the rest"
    except OfflineModeIsEnabled as error:
        cause, message = error, "HF_HUB_OFFLINE is set"
    except (httpx2.TransportError, LocalEntryNotFoundError, ConnectionError) as error:
        cause, message = error, "no connection to the Hub; what has been sent is kept, push again to send the rest"
    if token:
        message = message.replace(token, "hf_***")
    raise OSError(" ".join(f"{repo_id}: {message}".split())) from cause


def check_repository(
    repo_id: str,
    config: VWLmmConfig | None,
    base_model: str | None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[str, ModelInfo | None]:
    """Refuse a repository that a model cannot be pushed to.

    Args:
        config ([`VWLmmConfig`], *optional*): of the model; None for an adapter.
        base_model (`str`, *optional*): the adapter's base model.

    Returns:
        `tuple[str, ModelInfo | None]`: its full name and what is in it, None if it does not exist.

    Raises:
        ValueError: the name is not valid, there is another model in it, or it is public though `private` is asked for.
        OSError: there is no token, the token may not write, or there is no connection.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with explain_hub_errors(repo_id, token):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError(f"{repo_id}: the token may only read, expected one that may write")
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return repo_id, None
        if private and not info.private:
            raise ValueError(f"{repo_id} is public, and only a new repository can be made private")
        if revision is not None:
            with contextlib.suppress(RevisionNotFoundError):
                info = api.model_info(repo_id, revision=revision)
        if any(_ANY_WEIGHTS.fullmatch(file) for file in _files(info)) or CONFIG_NAME in _files(info):
            found = json.loads(_download(api, info, ADAPTER_CONFIG_NAME if config is None else CONFIG_NAME) or "{}")
            if config is None:
                is_same = found.get("base_model_name_or_path") == base_model
            else:
                is_same = found.get("model_type") == config.model_type
                is_same = is_same and _shape(VWLmmConfig.from_dict(found)) == _shape(config)
            if not is_same:
                raise ValueError(f"{repo_id} has another model in it, name another repository")
    return repo_id, info


def _shape(config: VWLmmConfig) -> list:
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "image_size", "patch_size")
    return [getattr(part, name, None) for part in (config.text_config, config.vision_config) for name in names]


def _files(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings]


def _download(api: HfApi, info: ModelInfo, name: str) -> str | None:
    if name not in _files(info):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = api.hf_hub_download(info.id, name, revision=info.sha, cache_dir=scratch)
        return Path(path).read_text(encoding="utf-8")


def _check_base(api: HfApi, base_model: str, base: Path) -> None:
    """Refuse a base model other than the one that the adapter was loaded on, or without code to load it with."""
    verified = api.verify_repo_checksums(base_model, local_dir=base)
    different = [mismatch["path"] for mismatch in verified.mismatches] + verified.extra_paths
    if any(name.endswith(".safetensors") for name in different):
        raise ValueError(f"{base_model} is not the base model: {name_some(different)} differ from those of its folder")
    if any(name.endswith(".py") for name in verified.extra_paths):
        raise ValueError(f"{base_model} has no code to load it without this package: push it with `vwlmm push`")


class Prepared(NamedTuple):
    """A repository as it would be sent, and the staged base model of an adapter, None for a model."""

    folder: Path
    base: Path | None
    card: ModelCard


def prepare(
    model: ModelFolder,
    scratch: Path,
    repo_id: str,
    base_model: str | None = None,
    card_text: str | None = None,
    token: str | None = None,
) -> Prepared:
    """Make the repository of a model or adapter, and load it as those who pull it will.

    Args:
        model ([`~modeling_vwlmm.hub.repository.ModelFolder`]): what `read_folder` found.
        scratch (`Path`): an empty folder, which the repository is made in.
        base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
        card_text (`str`, *optional*): the card that is in the repository.

    Raises:
        FileNotFoundError, ValueError: something is missing, does not load or holds a token.
        OSError: an adapter's base model cannot be downloaded.
    """
    validate_repo_id(repo_id)
    staged, base = scratch / "repository", None
    if model.trained_on is not None:
        base = scratch / "base"
        fill_repository(_find_base(model.folder, model.trained_on, base_model, token), base)
    fill_repository(model.folder, staged, base_model)
    check_loads(staged, model.folder, base)
    try:
        card = write_card(staged, repo_id, card_text)
    except ValueError as error:
        raise ValueError(str(error).replace(str(staged), str(model.folder))) from error
    make_harmless(staged, model.folder, token)
    return Prepared(staged, base, card)


def _find_base(folder: Path, trained_on: str, base_model: str | None, token: str | None) -> Path:
    """The folder of an adapter's base model. The code of its repository is not downloaded, so it cannot run."""
    source = Path(trained_on)
    if not source.is_dir():
        with explain_hub_errors(trained_on, token):
            source = Path(snapshot_download(trained_on, token=token, allow_patterns=["*.json", "*.safetensors"]))
    elif base_model is None:
        raise ValueError(
            f"{folder} is an adapter of the folder {trained_on}: push that first, and name its repository with "
            "--base-model"
        )
    return read_folder(source).folder


class Target(NamedTuple):
    """What is pushed, and where to: `info` and `card_text` are None if the repository does not exist."""

    model: ModelFolder
    repo_id: str
    base_model: str | None
    info: ModelInfo | None
    card_text: str | None


def look_at(
    folder: str | os.PathLike,
    repo_id: str,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Target:
    """Refuse what [`push`] refuses before it makes a repository, the first three of its points. Nothing is sent."""
    if create_pr and revision is not None:
        raise ValueError("a pull request is always for the main branch: give no revision")
    model = read_folder(folder)
    base_model = base_model or model.trained_on
    repo_id, info = check_repository(repo_id, model.config, base_model, private, revision, token)
    if create_pr and info is None:
        raise ValueError(f"{repo_id} does not exist, so that a pull request cannot be opened there")
    with explain_hub_errors(repo_id, token):
        card_text = _download(HfApi(token=token), info, "README.md") if info is not None else None
    return Target(model, repo_id, base_model, info, card_text)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder to make a repository in. Those of pushes that were killed are removed: they hold copies of models."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{SCRATCH}*"):
        try:
            with FileLock(left / LOCK_NAME, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):  # its push is at work, or it is another user's
            continue
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch, FileLock(Path(scratch) / LOCK_NAME):
        yield Path(scratch)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    token: str | None = None,
) -> CommitInfo:
    """Push a model or an adapter, with its processor, card, logs and code, in one commit.

    A push is refused before anything is sent, and this is the order in which that is decided:

    1. A pull request is asked for, and a branch beside it, or of a repository that does not exist.
    2. The folder has no VW-LMM model or adapter, or no processor: `read_folder`.
    3. The repository cannot be written to, has another model in it, or is public though `private` is asked for:
       `check_repository`.
    4. An adapter's base model cannot be had by others, the folder does not load, a record is damaged, or a file would
       hold a token: `prepare`.
    5. The Hub does not take the card's metadata.
    6. The repository of an adapter's base model has other weights, or no code.

    After the commit the files in the repository are compared with those that were sent. If a connection breaks, the
    next call sends only what has not arrived.

    Args:
        folder (`str` or `os.PathLike`): of the model or adapter. It stays as it is.
        repo_id (`str`): `name`, or `user/name`. The repository is made if it does not exist.
        base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
        private (`bool`, *optional*): whether a new repository is private.
        revision (`str`, *optional*): the branch. It is made if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.

    Raises:
        ValueError: the folder or the repository holds something else, or what is asked cannot be.
        OSError: files are missing, or the Hub did not take them.
    """
    token = token or get_token()
    model, repo_id, base_model_id, info, card_text = look_at(
        folder, repo_id, base_model, private, revision, create_pr, token
    )
    api = HfApi(token=token)
    with scratch_folder() as scratch:
        prepared = prepare(model, scratch, repo_id, base_model, card_text, token)
        with explain_hub_errors(repo_id, token):
            prepared.card.validate()
            if prepared.base is not None and base_model_id is not None:
                _check_base(api, base_model_id, prepared.base)
            if info is None:
                api.create_repo(repo_id, private=private)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=prepared.folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha if info is not None and not create_pr else None,
                delete_patterns=_other_shards(info, prepared.folder) if info is not None else None,
            )
            verified = api.verify_repo_checksums(repo_id, local_dir=prepared.folder, revision=commit.oid)
    failed = [mismatch["path"] for mismatch in verified.mismatches] + verified.extra_paths
    if failed:
        raise OSError(f"{repo_id}: {name_some(failed)} did not arrive as sent: push again")
    return commit


def _other_shards(info: ModelInfo, staged: Path) -> list[str]:
    """Weights in the repository that the new ones do not overwrite, because they had another number of shards."""
    return [name for name in _files(info) if _WEIGHTS.fullmatch(name) and not (staged / name).exists()]
