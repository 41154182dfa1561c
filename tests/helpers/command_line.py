"""Calls of `vwlmm` on the CPU."""

import pytest
import yaml

from modeling_vwlmm.cli import main


CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]


def recipe_of(tmp_path, model_folder, data, **fields):
    recipe = {
        "model": str(model_folder),
        "dataset": str(data),
        "image_folder": str(data.parent / "images"),
        "output_dir": str(tmp_path / "out"),
        "stage": "joint",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        **fields,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def error_of(capsys, *argv):
    """The one line that a bad call prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_of:
        main(list(argv))
    assert exit_of.value.code == 2
    printed = capsys.readouterr().err.strip().split("\n")
    assert len(printed) == 1 and "Traceback" not in printed[0]
    return printed[0]
