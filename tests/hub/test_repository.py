"""What belongs into a repository, without what is private."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from modeling_vwlmm.hub.push import prepare
from modeling_vwlmm.hub.redaction import without_home, without_paths, without_secrets
from modeling_vwlmm.hub.repository import AUTO_MAP, fill_repository, make_harmless, read_folder


@pytest.mark.parametrize(
    "text,expected",
    [
        ("/home/ann/runs/7b", "7b"),
        ("~/runs/7b/", "7b"),
        ("../ann/7b", "7b"),
        (r"C:\Users\ann\7b", "7b"),
        (str(Path.home()), "~"),
        ("/data/My Pictures/x.json", "x.json"),
        (
            "vwlmm train --output_dir=/home/ann/out --config recipes/x.yaml",
            "vwlmm train --output_dir=out --config recipes/x.yaml",
        ),
        ("me/model", "me/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("and/or 1/2 </s>", "and/or 1/2 </s>"),
    ],
)
def test_paths_in_logs(text, expected):
    assert without_paths({"a": [text]}, is_log=True) == {"a": [expected]}


def test_of_a_config_no_more_changes_than_has_to():
    config = {"text_config": {"_name_or_path": "/home/ann/7b"}, "target_modules": r".*\.(q|v)_proj", "x": "/home/ann"}
    assert without_paths(config, is_log=False) == {**config, "text_config": {"_name_or_path": "7b"}}


def test_paths_in_a_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"Trained on `{Path.home()}/x/data.json`, see https://example.org{Path.home()}x and /etc/x.")
    make_harmless(tmp_path, tmp_path, None)
    assert card.read_text() == f"Trained on `data.json`, see https://example.org{Path.home()}x and /etc/x."


def test_weights_that_are_pickled_become_safetensors(tmp_path, model_folder):
    expected = load_file(model_folder / "model.safetensors")
    torch.save(expected, model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    fill_repository(model_folder, tmp_path / "staged")
    assert [path.name for path in (tmp_path / "staged").glob("*model*.*") if path.suffix not in (".py", ".json")] == [
        "model.safetensors"
    ]
    assert load_file(tmp_path / "staged" / "model.safetensors").keys() == expected.keys()


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "config.json"])
def test_code_of_strangers_is_neither_run_nor_sent(tmp_path, model_folder, name):
    """However deep the `auto_map` that names it stands."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    content = json.loads((model_folder / name).read_text())
    content["auto_map"] = {"AutoProcessor": f"{tmp_path}--evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    if name == "config.json":
        content["vision_config"]["auto_map"] = {"AutoModel": f"{tmp_path}--evil.Evil"}
    (model_folder / name).write_text(json.dumps(content))
    (tmp_path / "scratch").mkdir()
    staged = prepare(read_folder(model_folder), tmp_path / "scratch", "me/model").folder
    assert not (tmp_path / "ran").exists() and not list(staged.glob("evil*"))
    maps = [path.name for path in staged.glob("*.json") if "evil" in path.read_text()]
    assert maps == [] and json.loads((staged / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "model.safetensors", "processor_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, model_folder, name):
    secret = tmp_path / "secret"
    secret.write_text("{}") if not name.endswith("safetensors") else shutil.copy(model_folder / name, secret)
    (model_folder / name).unlink(missing_ok=True)
    (model_folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret, outside of"):
        fill_repository(model_folder, tmp_path / "staged")


def test_a_link_within_the_folder_or_the_hubs_cache_is_followed(tmp_path, monkeypatch, model_folder):
    (model_folder / "blobs").mkdir()
    (model_folder / "tokenizer.json").rename(model_folder / "blobs" / "1")
    (model_folder / "tokenizer.json").symlink_to("blobs/1")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (model_folder / "config.json").rename(tmp_path / "cache" / "2")
    (model_folder / "config.json").symlink_to(tmp_path / "cache" / "2")
    fill_repository(model_folder, tmp_path / "staged")
    assert (tmp_path / "staged" / "tokenizer.json").is_file() and (tmp_path / "staged" / "config.json").is_file()


def test_files_of_other_names_stay(tmp_path, model_folder):
    others = ["wandb_config.json", "db.config.json", "LICENSE_SERVER_KEY", "my_results.json", "notes.txt"]
    for name in others:
        (model_folder / name).write_text('{"key": "secret"}')
    (model_folder / "LICENSE.md").write_text("Free.")
    fill_repository(model_folder, tmp_path / "staged")
    names = {path.name for path in (tmp_path / "staged").iterdir()}
    assert names.isdisjoint(others) and "LICENSE.md" in names


def test_a_home_folder_of_the_root_leaves_links_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    text = "[x](https://huggingface.co/a/b) and a/b | 3/4"
    assert without_home(text) == text


@pytest.mark.parametrize("host", ["step", "1234"])
def test_a_machine_that_is_called_like_a_key_or_a_number(monkeypatch, host):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    log = {"step": 1, "loss": 0.1234, "node": f"on {host}"}
    assert without_secrets(log) == {"step": 1, "loss": 0.1234, "node": "on host"}
