"""Calls of `vwlmm` that are no good, its help."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT
from helpers.command_line import error_of
from helpers.conversations import picture
from modeling_vwlmm.cli import main
from modeling_vwlmm.cli.main import VERBS


def test_bad_calls_are_one_line_and_status_2(tmp_path, capsys, model_folder):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "not a recipe" in error_of(capsys, "train", "--config", str(tmp_path / "list.yaml"))
    assert "nowhere.yaml" in error_of(capsys, "train", "--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1,")
    assert "broken.yaml is not YAML" in error_of(capsys, "train", f"--config={tmp_path / 'broken.yaml'}")
    assert 'no verb "trian"' in error_of(capsys, "trian")

    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    os.truncate(tmp_path / "c.png", 200)
    out = str(tmp_path / "out.png")
    for name in ("b.png", "c.png", "d.png"):
        assert name in error_of(capsys, "words", str(model_folder), str(tmp_path / name), "--output", out)
    for top in ("0", "1000"):
        image = str(tmp_path / "a.png")
        message = error_of(capsys, "words", str(model_folder), image, "--output", out, "--top", top)
        assert f"{top} words a patch are asked for, expected 1 to 99" in message
    assert not Path(out).exists()

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    llama.save_pretrained(tmp_path / "llama")
    image = str(tmp_path / "a.png")
    message = error_of(capsys, "generate", str(tmp_path / "llama"), image, "--prompt", "w5")
    assert 'expected a model of type "vwlmm", got one of type "llama"' in message


def test_help_has_an_example(capsys):
    for name, verb in VERBS.items():
        with pytest.raises(SystemExit) as exit_of:
            main([name, "--help"])
        assert exit_of.value.code == 0 and verb.EXAMPLE.startswith(f"vwlmm {name} ")
        assert f"example: {verb.EXAMPLE}" in " ".join(capsys.readouterr().out.split())
    printed = subprocess.run([sys.executable, "-m", "modeling_vwlmm"], capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 2 and "usage: vwlmm" in printed.stderr
    assert all(verb.SUMMARY in printed.stderr and verb.EXAMPLE in printed.stderr for verb in VERBS.values())
