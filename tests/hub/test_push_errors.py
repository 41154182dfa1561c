"""Pushing what cannot be pushed, or over a connection that breaks: one line, nothing or all of it there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modeling_vwlmm
import modeling_vwlmm.hub.push as hub_module
from helpers.adapters import base_folder, train
from helpers.command_line import error_of
from helpers.hub_server import READ_ONLY, TOKEN, Repo
from helpers.tiny import tiny_model
from modeling_vwlmm import weights
from modeling_vwlmm.cli import main
from modeling_vwlmm.hub import repository
from modeling_vwlmm.hub.push import push
from modeling_vwlmm.hub.repository import check_loads, fill_repository
from modeling_vwlmm.weights import read_weights


CODE = "modeling_vwlmm.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def folder(tmp_path, model):
    """Of a tiny model, to be damaged."""
    return shutil.copytree(model, tmp_path / "folder")


def refused(capsys, hub, *argv):
    """The one line that is printed when nothing is sent."""
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    line = error_of(capsys, "push", *map(str, argv))
    assert TOKEN not in line and READ_ONLY not in line
    assert {name: repo.refs for name, repo in hub.repos.items()} == before and not hub.objects
    return line


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.vm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FOLDERS = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no model, expected config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "truncated": (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "truncated"),
    "another type": (lambda folder: edit(folder / "config.json", model_type="llama"), 'a model of type "llama"'),
    "a LLaVA": (lambda folder: edit(folder / "config.json", model_type="llava"), "vwlmm convert"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
    "a token": (
        lambda folder: (folder / "chat_template.jinja").write_text(f"{{# {TOKEN} #}}"),
        "chat_template.jinja would hold a token",
    ),
    "a log is cut off": (
        lambda folder: (folder / "trainer_state.json").write_text("{"),
        "trainer_state.json is not JSON",
    ),
    "a tensor is missing": (drop_tensor, "does not load: ValueError.* missing: model.vm_head.weight"),
    "not finite": (not_finite, "does not load: ValueError: its logits are not finite"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_would_not_load(folder, hub, capsys, case):
    damage, message = FOLDERS[case]
    damage(folder)
    line = refused(capsys, hub, folder, "me/model")
    assert str(folder) in line and re.search(message, line)


def test_code_that_needs_more_than_torch_and_transformers(folder, tmp_path):
    fill_repository(folder, tmp_path / "staged")
    (tmp_path / "staged" / "visual_word_loss.py").write_text("import trl")
    with pytest.raises(ValueError, match="folder does not load without this package: .*trl"):
        check_loads(tmp_path / "staged", folder)


def another_model(hub, config):
    repo = hub.repos["me/model"] = Repo(private=False)
    repo.commit("main", {"config.json": json.dumps(config).encode(), "model.safetensors": b""}, "another")


ERRORS = {
    "no token": (lambda hub, patch: patch.delenv("HF_TOKEN"), [], "there is no token: run `hf auth login`"),
    "a token that is none": (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_" + "x" * 34), [], "is not valid"),
    "read-only": (lambda hub, patch: patch.setenv("HF_TOKEN", READ_ONLY), [], "may only read, expected one"),
    "no network": (lambda hub, patch: (hub.shutdown(), hub.server_close()), [], "no connection to the Hub"),
    "offline": (lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), [], "_OFFLINE"),
    "another model": (lambda hub, patch: another_model(hub, {"model_type": "llama"}), [], "has another model in it"),
    "another size": (
        lambda hub, patch: another_model(hub, tiny_model(llm="qwen3").config.to_dict()),
        [],
        "has another model in it",
    ),
    "an adapter there": (
        lambda hub, patch: hub.repos.setdefault("me/model", Repo(False)).commit(
            "main", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "adapter"
        ),
        [],
        "has another model in it",
    ),
    "public": (
        lambda hub, patch: hub.repos.setdefault("me/model", Repo(private=False)),
        ["--private"],
        "me/model is public",
    ),
    "a branch and a pull request": (lambda *_: None, ["--create-pr", "--revision", "dev"], "give no revision"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_repository_that_cannot_be_pushed_to(model, hub, capsys, monkeypatch, checked, case):
    set_up, switches, message = ERRORS[case]
    set_up(hub, monkeypatch)
    assert re.search(message, refused(capsys, hub, model, "me/model", *switches))
    assert not checked


@pytest.mark.parametrize("name", ["a b", "me/a/b", "-a", "a" * 97, "a..b", "https://example.org/me/a", ""])
def test_a_name_that_is_none(model, hub, capsys, name):
    assert name in refused(capsys, hub, "--", model, name)
    assert not hub.requests


def test_the_repository_of_somebody_else(model, hub, capsys, checked):
    assert "ann/model: the token may not write there" in refused(capsys, hub, model, "ann/model")


def test_metadata_that_the_hub_does_not_take(model, hub, capsys, checked):
    hub.faults.append(("POST /api/validate-yaml", 400))
    assert "told to answer 400" in refused(capsys, hub, model, "me/model")


def test_an_adapter_needs_its_base_model(tmp_path, hub, capsys, checked):
    train(tmp_path)
    assert "push that first" in refused(capsys, hub, tmp_path / "adapter", "me/adapter")
    hub.repos["me/other"] = Repo(private=False)
    line = error_of(capsys, "push", str(tmp_path / "adapter"), "me/adapter", "--base-model", "me/other")
    assert "me/other is not the base model: chat_template.jinja" in line and "me/adapter" not in hub.repos


def test_an_adapter_of_a_repository(tmp_path, hub, capsys, checked, monkeypatch):
    """Whose code is not run unasked."""
    train(tmp_path)
    push(tmp_path / "base", "me/base")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/base")
    bases = []
    monkeypatch.setattr(
        hub_module, "check_loads", lambda staged, name, base: bases.append(Path(base, CODE).read_text())
    )
    repo = hub.repos["me/base"]
    repo.commit("main", {**repo.commits[repo.refs["main"]], CODE: b"raise SystemExit"}, "other code")
    push(tmp_path / "adapter", "me/adapter")
    assert bases == [Path(modeling_vwlmm.__file__).with_name(CODE).read_text()]
    without = {path: file for path, file in repo.commits[repo.refs["main"]].items() if not path.endswith(".py")}
    repo.commit("main", without, "no code")
    line = error_of(capsys, "push", str(tmp_path / "adapter"), "me/adapter")
    assert "me/base has no code" in line
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/nothing")
    assert "me/nothing: the Hub answered 404" in error_of(capsys, "push", str(tmp_path / "adapter"), "me/second")


FAULTS = ["whoami-v2", "GET /api/models/me/model$", "create", "preupload", "batch", "PUT", "commit", "tree"]
RETRIED = {"preupload", "batch", "PUT", "tree"}


@pytest.mark.parametrize("fault", [401, 403, 409, 429, 500, "drop"])
@pytest.mark.parametrize("where", FAULTS)
def test_what_goes_wrong_is_retried_or_told_and_a_second_push_finishes(sharded, hub, checked, where, fault):
    hub.faults.append((where, fault))
    try:
        push(sharded, "me/model")
        retried = True
    except OSError as error:
        retried = False
        assert re.fullmatch("(me/)?model: [^\n]+", str(error)) and TOKEN not in str(error)
    assert not hub.faults
    assert retried == (where in RETRIED and fault in (429, 500, "drop"))
    push(sharded, "me/model")
    files = hub.files("me/model")
    for path in sharded.glob("*.safetensors"):
        assert files[path.name] == path.read_bytes()
    assert list(hub.repos["me/model"].titles.values()) == ["initial commit", "Upload model"]
    assert all(hub.sent[oid] == len(content) for oid, content in hub.objects.items())


def test_what_arrives_is_looked_at(model, hub, capsys, checked, monkeypatch):
    commit = Repo.commit
    monkeypatch.setattr(
        Repo, "commit", lambda self, ref, files, title: commit(self, ref, {**files, "config.json": b"{}"}, title)
    )
    assert "config.json did not arrive as sent: push again" in error_of(capsys, "push", str(model), "me/model")


@pytest.mark.parametrize("fault", ["drop", 429, 500])
def test_a_download_goes_on_where_it_broke_off(model, hub, checked, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    push(model, "me/model")
    hub.faults.append(("GET .*model.safetensors", fault))
    api = HfApi()
    if fault == 500:
        with pytest.raises(HfHubHTTPError, match="500"):
            api.snapshot_download("me/model", cache_dir=tmp_path / "pulled")
    pulled = api.snapshot_download("me/model", cache_dir=tmp_path / "pulled")
    assert (model / "model.safetensors").read_bytes() == open(f"{pulled}/model.safetensors", "rb").read()
    assert not hub.faults
    assert any(line.endswith(" 206") for line in hub.requests) == (fault == "drop")


def test_a_branch_and_a_pull_request(model, hub, checked, capsys):
    main(["push", str(model), "me/model"])
    first = hub.repos["me/model"].refs["main"]
    edit_of = {**hub.repos["me/model"].commits[first], "README.md": hub.files("me/model")["README.md"] + b"\nMine.\n"}
    second = hub.repos["me/model"].commit("main", edit_of, "by hand")
    edit(model / "generation_config.json", max_new_tokens=7)
    main(["push", str(model), "me/model", "--revision", "dev"])
    main(["push", str(model), "me/model", "--create-pr"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/model/discussions/1"
    refs = hub.repos["me/model"].refs
    assert refs["main"] == second and set(refs) == {"main", "dev", "refs/pr/1"}
    for revision in ("dev", "refs/pr/1"):
        files = hub.files("me/model", revision)
        assert b'"max_new_tokens": 7' in files["generation_config.json"]
        assert b"Mine." in files["README.md"]


def test_a_commit_in_between_is_not_overwritten(model, hub, checked, monkeypatch):
    push(model, "me/model")
    repo = hub.repos["me/model"]
    monkeypatch.setattr(
        hub_module, "check_loads", lambda *_: repo.commit("main", repo.commits[repo.refs["main"]], "in between")
    )
    edit(model / "generation_config.json", max_new_tokens=8)
    with pytest.raises(OSError, match="me/model: the repository has changed meanwhile"):
        push(model, "me/model")


def test_weights_are_sharded_and_old_shards_go(tmp_path, model, hub, checked, monkeypatch):
    push(model, "me/model")
    monkeypatch.setattr(repository, "LARGEST_FILE", 10_000)
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", 30_000)
    push(model, "me/model")
    names = {name for name in hub.files("me/model") if "safetensors" in name}
    assert names == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} | {"model.safetensors.index.json"}
    pulled = HfApi().snapshot_download("me/model", cache_dir=tmp_path / "pulled")
    expected = load_file(model / "model.safetensors")
    found = {name: tensor.read() for name, tensor in read_weights(pulled).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_dry_run_sends_nothing(model, hub, capsys):
    capsys.readouterr()
    main(["push", str(model), "me/model", "--dry-run"])
    printed = capsys.readouterr().out
    size = (model / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in printed and "pipeline_tag: image-text-to-text" in printed
    assert "would go to the branch main of a new repository me/model, public" in printed
    main(["push", str(model), "me/model", "--dry-run", "--private", "--revision", "dev"])
    assert "would go to the branch dev of a new repository me/model, private" in capsys.readouterr().out
    assert all(request.startswith("GET") for request in hub.requests) and not hub.repos


@pytest.mark.parametrize("case", ["a branch and a pull request", "another model", "public"])
def test_a_dry_run_refuses_what_a_push_refuses(model, hub, capsys, monkeypatch, checked, case):
    set_up, switches, message = ERRORS[case]
    set_up(hub, monkeypatch)
    assert re.search(message, refused(capsys, hub, model, "me/model", "--dry-run", *switches))


def test_a_dry_run_needs_no_token(model, hub, capsys, monkeypatch, checked):
    monkeypatch.delenv("HF_TOKEN")
    capsys.readouterr()
    main(["push", str(model), "me/model", "--dry-run"])
    printed = capsys.readouterr()
    assert "the repository was not looked at: " in printed.err and "there is no token" in printed.err
    assert "bytes in" in printed.out


def test_a_pull_request_needs_a_repository(model, hub, capsys, checked):
    assert "me/new does not exist" in refused(capsys, hub, model, "me/new", "--create-pr")


def test_what_a_killed_push_left_is_removed(model, hub, checked, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "vwlmm-push-killed").mkdir()
    (tmp_path / "vwlmm-push-killed" / "model.safetensors").write_bytes(b"half")
    with hub_module.scratch_folder() as other:
        push(model, "me/model")
        assert [path.name for path in tmp_path.glob("vwlmm-push-*")] == [other.name]
