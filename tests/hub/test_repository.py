"""What belongs into a repository, without what is private."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

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
        ("dataset:/home/ann/x.json", "dataset:x.json"),
        ("from ~/runs/7b to ../../ann/8b, then", "from 7b to 8b, then"),
        ("ran in /home/ann/My Pictures/of cats/x.json today", "ran in x.json today"),
        ("in /data/x and /data/y", "in x and y"),
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


SECRETS = {
    "Hugging Face": "hf_" + "a" * 34,
    "wandb": "wandb login " + "0123456789" * 4,
    "wandb, new": "wandb_v1_" + "A1b2" * 10,
    "OpenAI": "sk-proj-" + "a1B2" * 8,
    "AWS": "AKIA" + "ABCD" * 4,
    "GitHub": "ghp_" + "a1" * 18,
    "GitHub, fine": "github_pat_" + "a1" * 20,
    "a password": "https://ann:secret99@example.org/data",
    "a key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_of_other_services(tmp_path, model_folder, kind):
    found = without_secrets({"a": [f"x {SECRETS[kind]} y"]})["a"][0]
    assert found.startswith("x ") and found.endswith(" y") and "***" in found
    assert not any(part in found for part in ("0123456789", "a1", "A1", "ABCD", "secret99", "MIIE", "aaa"))
    for name in ("README.md", "chat_template.jinja", "examples/0.png"):
        fill_repository(model_folder, tmp_path / "staged")
        (tmp_path / "staged" / "README.md").touch()
        (tmp_path / "staged" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "staged" / name).write_text(f"x {SECRETS[kind]} y")
        with pytest.raises(ValueError, match=f"{name} would hold a token or password"):
            make_harmless(tmp_path / "staged", model_folder, None)
        shutil.rmtree(tmp_path / "staged")


def test_what_is_no_secret_stays():
    text = "commit 0123456789012345678901234567890123456789, task-specific-fine-tuning-of-models, https://a.org/b@c"
    assert without_secrets(text) == text


def test_the_user_and_the_machine(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-01.lab.example.org")
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    text = "ann@other:x, bob@gpu-01, gpu-01.lab.example.org, gpu-01 and bob@example.org"
    assert without_secrets(text) == "host:x, host, host, host and bob@example.org"


def test_a_template_that_names_a_home_folder_is_refused(tmp_path, model_folder):
    template = model_folder / "chat_template.jinja"
    template.write_text("{# from /home/ann/templates #}" + template.read_text())
    fill_repository(model_folder, tmp_path / "staged")
    (tmp_path / "staged" / "README.md").touch()
    with pytest.raises(ValueError, match="chat_template.jinja would name /home/ann/templates"):
        make_harmless(tmp_path / "staged", model_folder, None)


@pytest.mark.parametrize("kind", ["model", "shards", "adapter"])
def test_notes_in_files_of_weights_are_not_sent(tmp_path, model_folder, kind):
    expected = load_file(model_folder / "model.safetensors")
    notes = {"format": "pt", "run": "/home/ann/x", "token": SECRETS["GitHub"]}
    save_file(expected, model_folder / "model.safetensors", metadata=notes)
    if kind == "adapter":
        (model_folder / "model.safetensors").rename(model_folder / "adapter_model.safetensors")
        (model_folder / "adapter_config.json").write_text("{}")
    elif kind == "shards":
        (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00001.safetensors")
        index = {"metadata": notes, "weight_map": dict.fromkeys(expected, "model-00001-of-00001.safetensors")}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fill_repository(model_folder, tmp_path / "staged")
    (weights,) = (tmp_path / "staged").glob("*.safetensors")
    assert load_file(weights).keys() == expected.keys()
    assert b"ann" not in b"".join(path.read_bytes() for path in (tmp_path / "staged").glob("*model*.safetensors*"))


def test_notes_in_example_images_are_not_sent(tmp_path, model_folder):
    (model_folder / "examples").mkdir()
    notes, tags = PngInfo(), Image.Exif()
    notes.add_text("Comment", "ann's desktop")
    tags[0x010E], tags[0x0112] = "ann's desktop", 6
    image = Image.linear_gradient("L").resize((9, 7)).convert("RGB")
    image.save(model_folder / "examples" / "0.png", pnginfo=notes)
    image.save(model_folder / "examples" / "1.jpg", exif=tags, comment="ann's desktop")
    image.save(model_folder / "examples" / "2.webp", exif=tags, lossless=True)
    image.save(model_folder / "examples" / "3.jpg")
    fill_repository(model_folder, tmp_path / "staged")
    sent = {path.name: path for path in (tmp_path / "staged" / "examples").iterdir()}
    assert len(sent) == 4 and not any(b"ann" in path.read_bytes() for path in sent.values())
    assert np.array_equal(Image.open(sent["0.png"]), image)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(Image.open(sent["2.webp"]), upright)
    assert np.abs(np.asarray(Image.open(sent["1.jpg"]), int) - np.asarray(upright)).max() < 12
    assert sent["3.jpg"].read_bytes() == (model_folder / "examples" / "3.jpg").read_bytes()


@pytest.mark.parametrize("host", ["step", "1234"])
def test_a_machine_that_is_called_like_a_key_or_a_number(monkeypatch, host):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    log = {"step": 1, "loss": 0.1234, "node": f"on {host}"}
    assert without_secrets(log) == {"step": 1, "loss": 0.1234, "node": "on host"}
