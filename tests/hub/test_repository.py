"""What belongs into a repository, without what is private."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_vwlmm.hub.repository import make_harmless, stage, without_paths


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
    stage(model_folder, tmp_path / "staged")
    assert [path.name for path in (tmp_path / "staged").glob("*model*.*") if path.suffix not in (".py", ".json")] == [
        "model.safetensors"
    ]
    assert load_file(tmp_path / "staged" / "model.safetensors").keys() == expected.keys()
