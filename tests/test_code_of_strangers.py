"""What is written names no code: whoever trusts the folder later would run it."""

import json

import pytest

from helpers.adapters import train
from helpers.command_line import CPU, recipe_of
from modeling_vwlmm.cli import main


@pytest.fixture
def strange(tmp_path, model_folder):
    """A model whose configs name code, beside it."""
    (model_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    name_code(model_folder)
    return model_folder


def name_code(folder):
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        content["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        for part in [value for value in content.values() if isinstance(value, dict) and "auto_map" not in value]:
            part["auto_map"] = {"AutoModel": "evil.Evil"}
        path.write_text(json.dumps(content))


def assert_harmless(tmp_path, *folders):
    assert not (tmp_path / "ran").exists()
    for folder in folders:
        named = [path.name for path in folder.rglob("*.json") if "evil" in path.read_text()]
        assert named == [] and (folder / "tokenizer_config.json").is_file(), folder


def test_train_neither_runs_nor_writes_it(tmp_path, strange, data):
    recipe = recipe_of(tmp_path, strange, data)
    saves = [*CPU[: CPU.index("--save_strategy")], "--save_strategy", "steps"]
    main(["train", "--config", recipe, *saves])
    assert_harmless(tmp_path, tmp_path / "out", tmp_path / "out" / "checkpoint-1")


def test_merge_neither_runs_nor_writes_it(tmp_path):
    train(tmp_path)
    (tmp_path / "adapter" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("base", "adapter"):
        name_code(tmp_path / name)
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert_harmless(tmp_path, tmp_path / "merged")


def test_export_to_llava_neither_runs_nor_writes_it(tmp_path, strange):
    main(["convert", str(strange), str(tmp_path / "llava"), "--to", "llava"])
    assert_harmless(tmp_path, tmp_path / "llava")


def test_an_llm_that_needs_its_own_code_is_not_loaded_and_nobody_is_asked(tmp_path, capsys, strange):
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "evil"}
    config["auto_map"] = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--language-model", str(strange), "--vision-tower", str(strange), str(tmp_path / "new")])
    assert stop.value.code == 2 and "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
