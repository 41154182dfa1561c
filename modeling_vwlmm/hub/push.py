"""Pushing to the Hub: in one commit, to a repository that is ours, and not without looking whether it arrived."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
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
from .repository import check_loads, fill_repository, make_harmless, read_folder


_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ANY_WEIGHTS = re.compile(r"[^/]*\.(safetensors|bin|gguf|pt|pth|ckpt|h5|msgpack|onnx)")


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, token: str | None) -> Iterator[None]:
    """What goes wrong on the way to the Hub, as an `OSError` of one line that has no token in it."""
    try:
        try:
            yield
            return
        except RuntimeError as error:  # names the file; what happened is its cause
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
    """The full name of a repository that a model may be pushed to, and what is there, None if it does not exist.

    Args:
        config ([`VWLmmConfig`], *optional*): of the model; None for an adapter.
        base_model (`str`, *optional*): the adapter's base model.

    Raises:
        ValueError: the name is none, there is another model, or `private` is asked of a repository that is not.
        OSError: there is no token, one that may not write, or no connection.
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
    """That the repository has the weights which the adapter was seen to load on, and code to load them with."""
    verified = api.verify_repo_checksums(base_model, local_dir=base)
    different = [mismatch["path"] for mismatch in verified.mismatches] + verified.extra_paths
    if any(name.endswith(".safetensors") for name in different):
        raise ValueError(f"{base_model} is not the base model: {name_some(different)} differ from those of its folder")
    if any(name.endswith(".py") for name in verified.extra_paths):
        raise ValueError(f"{base_model} has no code to load it without this package: push it with `vwlmm push`")


def prepare(
    folder: str | os.PathLike,
    into: Path,
    repo_id: str,
    base_model: str | None = None,
    card_text: str | None = None,
    token: str | None = None,
) -> ModelCard:
    """Make the repository of a model folder, in a new folder, and see that it loads.

    Args:
        base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
        card_text (`str`, *optional*): the card that is in the repository.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.

    Raises:
        FileNotFoundError, ValueError: something is missing, does not load or holds a token.
        OSError: an adapter's base model cannot be downloaded.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    _, trained_on = read_folder(folder)
    base = None
    if trained_on is not None:
        base, source = into.with_name(into.name + "-base"), Path(trained_on)
        if not source.is_dir():
            # With the code of this package in place of its own, which nobody has said to trust
            with explain_hub_errors(trained_on, token):
                source = Path(snapshot_download(trained_on, token=token, allow_patterns=["*.json", "*.safetensors"]))
        elif base_model is None:
            raise ValueError(
                f"{folder} is an adapter of the folder {trained_on}: push that first, and name its repository with "
                "--base-model"
            )
        read_folder(source)
        fill_repository(source, base)
    fill_repository(folder, into, base_model)
    check_loads(into, folder, base)
    try:
        card = write_card(into, repo_id, card_text)
    except ValueError as error:
        raise ValueError(str(error).replace(str(into), str(folder))) from error
    make_harmless(into, folder, token)
    return card


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
    """Push a model or an adapter, with its processor, card, logs and code, and see that it arrived.

    In one commit, of which nothing is sent if the folder does not load. What was sent before a connection broke is not
    sent again by the next call.

    Args:
        folder (`str` or `os.PathLike`): of the model or adapter, which stays as it is.
        repo_id (`str`): `name`, or `user/name`; made if it does not exist.
        base_model (`str`, *optional*): the repository of an adapter's base model, if it was trained on a folder.
        private (`bool`, *optional*): whether a new repository is.
        revision (`str`, *optional*): the branch, made if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.

    Raises:
        ValueError: the folder or the repository holds something else, or what is asked cannot be.
        OSError: files are missing, or the Hub did not take them.
    """
    if create_pr and revision is not None:
        raise ValueError("a pull request is always for the main branch: give no revision")
    folder, token = Path(folder), token or get_token()
    config, trained_on = read_folder(folder)
    repo_id, info = check_repository(repo_id, config, base_model or trained_on, private, revision, token)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="vwlmm-push-") as scratch:
        staged, base = Path(scratch) / "repository", Path(scratch) / "repository-base"
        with explain_hub_errors(repo_id, token):
            card_text = _download(api, info, "README.md") if info is not None else None
        card = prepare(folder, staged, repo_id, base_model, card_text, token)
        with explain_hub_errors(repo_id, token):
            card.validate()
            if base.is_dir():
                _check_base(api, base_model or trained_on, base)
            if info is None:
                api.create_repo(repo_id, private=private)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            local = {path.name for path in staged.iterdir()}
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha if info is not None and not create_pr else None,
                # Shards of another number
                delete_patterns=[name for name in _files(info) if _WEIGHTS.fullmatch(name) and name not in local]
                if info is not None
                else None,
            )
            verified = api.verify_repo_checksums(repo_id, local_dir=staged, revision=commit.oid)
    failed = [mismatch["path"] for mismatch in verified.mismatches] + verified.extra_paths
    if failed:
        raise OSError(f"{repo_id}: {name_some(failed)} did not arrive as sent: push again")
    return commit
