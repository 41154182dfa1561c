"""Calls of `vwlmm` that are no good, its help."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants, get_session
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT
from helpers.command_line import CPU, error_of, recipe_of
from helpers.conversations import picture
from helpers.hub_server import Repo
from modeling_vwlmm import __version__
from modeling_vwlmm.cli import main, shared
from modeling_vwlmm.cli.main import VERBS
from modeling_vwlmm.files import reading


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


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_has_an_example(capsys):
    for name, verb in VERBS.items():
        with pytest.raises(SystemExit) as exit_of:
            main([name, "--help"])
        assert exit_of.value.code == 0 and verb.EXAMPLE.startswith(f"vwlmm {name} ")
        assert f"example: {verb.EXAMPLE}" in " ".join(capsys.readouterr().out.split())
    printed = subprocess.run([sys.executable, "-m", "modeling_vwlmm"], capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 2 and "usage: vwlmm" in printed.stderr
    assert all(verb.SUMMARY in printed.stderr and verb.EXAMPLE in printed.stderr for verb in VERBS.values())


@pytest.mark.parametrize(
    "error, says",
    [
        (SafetensorError("header too large"), "header too large"),
        (pickle.UnpicklingError("bad"), "bad"),
        (EOFError(), "EOFError"),
        (MemoryError(), "not enough memory"),
        (TemplateError("no template"), "no template"),
        (httpx2.ReadTimeout("timed out"), "timed out"),
        (DatasetGenerationError("no data"), "no data"),
        (Exception("of tokenizers"), "of tokenizers"),
        (
            ValueError(f"two\nlines with hf_{'a' * 34} and https://me:pass@host"),
            "two lines with hf_*** and https://***@",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_bad_input_is_one_line_without_tokens_whatever_a_library_raises(monkeypatch, capsys, error, says):
    monkeypatch.setattr(VERBS["words"], "main", lambda argv: throw(error))
    assert says in error_of(capsys, "words")


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), AttributeError("a"), RuntimeError("a")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(VERBS["words"], "main", lambda argv: throw(error))
    with pytest.raises(type(error)):
        main(["words"])


def test_what_a_library_raises_while_it_reads_a_file_names_the_file():
    with pytest.raises(ValueError, match="^here.json cannot be read: KeyError: 'a'$"), reading("here.json"):
        throw(KeyError("a"))
    with pytest.raises(FileNotFoundError), reading("here.json"):
        throw(FileNotFoundError("here.json"))


def throw(error):
    raise error


@pytest.mark.parametrize("verb", ["generate", "words", "evaluate", "train"])
def test_a_mistyped_model_is_no_fault_of_the_connection(tmp_path, capsys, data, verb):
    image = str(data.parent / "images" / "0.png")
    options = {
        "generate": ["my/modle", image, "--prompt", "w5"],
        "words": ["my/modle", image, "--output", str(tmp_path / "out.png")],
        "evaluate": ["my/modle", "--dataset", str(data), "--image-folder", str(data.parent / "images")],
        "train": ["--config", recipe_of(tmp_path, "my/modle", data), *CPU],
    }
    message = error_of(capsys, verb, *options[verb])
    assert "my/modle: no such folder, and no repository that can be reached" in message


def test_fields_of_a_repository_are_checked_as_those_of_a_folder(hub, tmp_path, capsys, model_folder, data):
    config = json.loads((model_folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    repo = hub.repos["me/model"] = Repo(private=False)
    repo.commit("main", {**files, "config.json": json.dumps(config).encode()}, "model")
    said = 'me/model/config.json: vision_config.hidden_size is "wide", expected a whole number or a list of them'
    image = str(data.parent / "images" / "0.png")
    assert said in error_of(capsys, "generate", "me/model", image, "--prompt", "w20")
    recipe = recipe_of(tmp_path, "me/model", data)
    assert said in error_of(capsys, "train", "--config", recipe, *CPU)


def test_an_interruption_of_the_first_imports_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.set_client_factory", lambda factory: throw(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit_of:
        main(["words"])
    assert exit_of.value.code == 130 and capsys.readouterr().err.strip() == "vwlmm words: interrupted"


INTERRUPTED = """
import sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "huggingface_hub":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from modeling_vwlmm.__main__ import main
main()
"""


def test_an_interruption_before_there_is_a_verb_is_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nvwlmm: interrupted\n")


def test_wrong_calls_do_not_print_the_whole_usage(capsys, model_folder):
    assert "invalid int value: 'many'" in error_of(capsys, "words", "a", "b.png", "--json", "--top", "many")
    assert "invalid float value: 'fast'" in error_of(capsys, "train", "--learning_rate", "fast")


def test_names_that_are_not_utf8_are_refused_at_the_start(tmp_path, capsys):
    assert "is not UTF-8" in error_of(capsys, "train", "--output_dir", str(tmp_path / "a\udcff"))
    (tmp_path / "recipe.yaml").write_text('output_dir: "a\\udcff"')
    assert "is not UTF-8" in error_of(capsys, "train", "--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]" for i in range(9)])],
    ids=["endless", "bomb"],
)
def test_recipes_that_their_aliases_blow_up_are_refused(tmp_path, capsys, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert "recipe.yaml cannot be read: aliases" in error_of(
        capsys, "train", "--config", str(tmp_path / "recipe.yaml")
    )


def test_a_hub_that_does_not_answer_ends_the_wait(monkeypatch, capsys):
    monkeypatch.setattr(shared, "WAIT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(VERBS["words"], "main", lambda argv: get_session().get(url))
        assert "timed out" in error_of(capsys, "words")


def test_help_and_wrong_verbs_start_at_once():
    """Without torch or transformers, which take seconds to import; only the fields of `train` are TRL's."""
    calls = [["--help"], ["trian"], *([verb, "--help"] for verb in VERBS if verb != "train")]
    code = f"""
import contextlib, os, sys
from modeling_vwlmm.cli import main
for call in {calls}:
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(call)
print([name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert printed.stdout == "[]\n", printed.stderr
