"""What `vwlmm convert` refuses. One line names the file and what was expected, and nothing is left behind."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig

from helpers.conversion import write_llava
from helpers.published import PUBLISHED, write_published
from helpers.tiny import tiny_model
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM, weights
from modeling_vwlmm.cli import main


CPU = ["--use_cpu", "true", "--bf16", "false"]
NANO = Path(__file__).parents[2] / "hub_card" / "vwlmm-nano"


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert, expect the one line, and that nothing was made."""

    def run(*arguments, destination="ours"):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            main(["convert", *map(str, arguments), str(tmp_path / destination)])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vwlmm")]
        assert stop.value.code == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return line

    return run


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def index(content):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def tensors(name, shape):
    def change(folder):
        path = folder / "model.safetensors"
        found = load_file(path)
        found.pop(name, None)
        if shape is not None:
            found[name] = torch.zeros(shape, dtype=torch.int8 if shape == (300, 24) else torch.float32)
        save_file(found, path)

    return change


def write(name, content):
    def change(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)

    return change


SHARDS = {"shards": 3}
BIN = {"suffix": "bin"}
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
CASES = {
    "no weights": ({}, remove("model.safetensors"), ["has no weights", "model.safetensors or pytorch_model.bin"]),
    "no config": ({}, remove("config.json"), ["config.json: no such file"]),
    "no tokenizer": ({}, remove("tokenizer.model"), ["tokenizer.model: no such file", "sentencepiece"]),
    "an empty tokenizer": ({}, write("tokenizer.model", b""), ["source/tokenizer.model is empty"]),
    "a tokenizer of Git LFS": (
        {},
        write("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ["source/tokenizer.model is a pointer of Git LFS"],
    ),
    "truncated": ({}, truncate("model.safetensors"), ["model.safetensors is truncated"]),
    "missing shard": (SHARDS, remove(SHARD), [f"{SHARD}: no such shard", INDEX]),
    "truncated shard": (SHARDS, truncate(SHARD), [f"{SHARD} is truncated"]),
    "truncated bin": (BIN, truncate("pytorch_model.bin"), ["pytorch_model.bin cannot be read"]),
    "missing bin shard": (
        {**SHARDS, **BIN},
        remove("pytorch_model-00003-of-00003.bin"),
        ["pytorch_model-00003-of-00003.bin: no such shard"],
    ),
    "absent tensors": (
        SHARDS,
        index({"weight_map": {"lm_head.weight": SHARD, "a.b": SHARD}}),
        [f"{SHARD} lacks tensors that {INDEX} names: a.b"],
    ),
    "no weight map": (SHARDS, index({"weights": {}}), [INDEX, "weight_map"]),
    "a list for a weight map": (SHARDS, index({"weight_map": ["a"]}), [INDEX, "weight_map"]),
    "a number for a shard": (SHARDS, index({"weight_map": {"a": 1}}), [INDEX, "weight_map"]),
    "an index that leads elsewhere": (SHARDS, index({"weight_map": {"a": f"../{SHARD}"}}), [f"../{SHARD}"]),
    "missing tensor": ({}, tensors("lm_head.weight", None), ["missing: lm_head.weight"]),
    "unexpected tensor": ({}, tensors("model.extra", (1,)), ["unexpected: model.extra"]),
    "shape": ({}, tensors("model.norm.weight", (23,)), ["model.safetensors", "norm.weight", "(23,)", "says (24,)"]),
    "config of another shape": (
        {},
        config(intermediate_size=50),
        ["mlp.down_proj", "model.safetensors", "(24, 48)", "(24, 50)"],
    ),
    "config of fewer layers": ({}, config(num_hidden_layers=1), ["unexpected", "layers.1"]),
    "quantized": ({}, tensors("lm_head.weight", (300, 24)), ["lm_head.weight", "int8", "quantized"]),
    "config that is no JSON": (
        {},
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is not JSON"],
    ),
    "config that is a list": ({}, lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "object"]),
    "architecture": ({}, config(architectures=["LlavaMptForCausalLM"]), ["LlavaMptForCausalLM", "--variant"]),
    "no architecture": ({}, config(architectures=None), ["names no architecture", "--variant vicuna, mistral"]),
    "another projector": ({}, config(mm_projector_type="linear"), ["mm_projector_type", '"linear"', "mlp2x_gelu"]),
    "LLaVA-1.6": ({}, config(image_aspect_ratio="anyres"), ["image_aspect_ratio", '"anyres"']),
    "no such tower": ({}, config(mm_vision_tower="/no/such/tower"), ["/no/such/tower"]),
    "another tower": (
        {},
        lambda folder: edit_json(folder.parent / "source-tower" / "config.json", num_hidden_layers=2),
        ["vision_tower", "source-tower", "--vision-tower"],
    ),
    "no preprocessor": (
        {},
        lambda folder: (folder.parent / "source-tower" / "preprocessor_config.json").unlink(),
        ["source-tower", "preprocessor_config.json"],
    ),
    "a list in a bin": (
        BIN,
        write("pytorch_model.bin", [torch.zeros(1)]),
        ["pytorch_model.bin holds a list", "tensors"],
    ),
    "a number in a bin": (BIN, write("pytorch_model.bin", {"a": 1}), ["pytorch_model.bin holds a int", '"a"']),
    "code in a bin": (BIN, write("pytorch_model.bin", {"a": Malicious()}), ["pytorch_model.bin cannot be read"]),
    "a pickle": (BIN, write("pytorch_model.bin", pickle.dumps(Malicious())), ["pytorch_model.bin cannot be read"]),
    "a text": (BIN, write("pytorch_model.bin", b"version https://git-lfs"), ["pytorch_model.bin cannot be read"]),
    "an empty bin": (BIN, write("pytorch_model.bin", b""), ["pytorch_model.bin cannot be read"]),
    "an empty safetensors": ({}, write("model.safetensors", b""), ["model.safetensors is truncated"]),
    "pif without VM head": (
        {"vm_head": False, "architecture": "vwPifLlamaForCausalLM"},
        lambda folder: None,
        ["has no VM head"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_that_do_not_convert(tmp_path, monkeypatch, refused, case):
    monkeypatch.chdir(tmp_path)
    options, change, expected = CASES[case]
    write_published(tmp_path / "source", **options)
    change(tmp_path / "source")
    line = refused(tmp_path / "source")
    for part in expected:
        assert part in line
    assert not (tmp_path / "executed").exists()


LAYOUTS = {
    "an LLM": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "another LLaVA": {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]},
    "nothing": {},
    "ours": {"model_type": "vwlmm"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unknown_layouts(tmp_path, refused, layout):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(LAYOUTS[layout]))
    line = refused(tmp_path / "source")
    assert ("is a VW-LMM model already" if layout == "ours" else "expected a published VW-LMM") in line


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_destination_that_exists(tmp_path, refused, kind):
    write_published(tmp_path / "source")
    there = tmp_path / "ours"
    if kind == "folder":
        there.mkdir()
    elif kind == "file":
        there.write_text("mine")
    else:
        there.symlink_to(tmp_path / "nowhere")
    assert f"{there} exists already" in refused(tmp_path / "source")
    assert kind != "file" or there.read_text() == "mine"


def test_a_source_that_does_not_exist(tmp_path, refused):
    assert f"{tmp_path}/none: no such folder" in refused(tmp_path / "none")
    assert "no/repo is no folder, and no repository that can be reached" in refused("no/repo")


CALLS = [
    ["--variant", "gemma", "SOURCE"],
    ["--to", "llava", "--vision-tower", "x", "SOURCE"],
    ["--to", "llava", "SOURCE"],
    ["--language-model", "SOURCE"],
    ["--language-model", "x", "--vision-tower", "y", "SOURCE"],
    [],
]
CALL_ERRORS = [
    "expected one of vicuna, mistral, vicuna-pif",
    "--to llava takes SRC DST alone",
    'of type "vwlmm"',
    "--language-model X --vision-tower Y DST",
    "expected SRC DST",
    "expected SRC DST",
]


@pytest.mark.parametrize("arguments, message", list(zip(CALLS, CALL_ERRORS, strict=True)))
def test_wrong_calls(tmp_path, refused, arguments, message):
    write_published(tmp_path / "source")
    assert message in refused(*[tmp_path / "source" if part == "SOURCE" else part for part in arguments])


def test_a_tower_for_a_llava_of_transformers(tmp_path, refused):
    write_llava(tmp_path / "source")
    assert "its config says all" in refused("--vision-tower", tmp_path, tmp_path / "source")


@pytest.mark.parametrize("part", ["--language-model", "--vision-tower"])
def test_parts_that_are_not_there(tmp_path, refused, part):
    tiny_model().save_pretrained(tmp_path / "model")
    parts = {"--language-model": PUBLISHED, "--vision-tower": PUBLISHED / "vicuna" / "vision_tower"}
    parts[part] = tmp_path / "none"
    line = refused(*[text for pair in parts.items() for text in pair])
    assert "none" in line or str(PUBLISHED) in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    write_published(tmp_path / "source")
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "20KB")
    written = []

    def save(*args, **kwargs):
        written.append(save_file(*args, **kwargs))
        if len(written) == 2:
            raise error

    monkeypatch.setattr(weights, "save_file", save)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["convert", str(tmp_path / "source"), str(tmp_path / "ours")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source-tower"]


def test_a_kill_leaves_no_folder_that_looks_finished(tmp_path):
    write_published(tmp_path / "source")
    slow = (
        "import time; from modeling_vwlmm import cli, weights; save = weights.save_file\n"
        "def slowly(*args, **kwargs): save(*args, **kwargs); print('saved', flush=True); time.sleep(60)\n"
        f"weights.save_file = slowly; cli.main(['convert', {str(tmp_path / 'source')!r}, {str(tmp_path / 'ours')!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "ours").exists()
    main(["convert", str(tmp_path / "source"), str(tmp_path / "ours")])
    VWLmmForCausalLM.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("layout", ["published", "original", "llava"])
def test_loading_what_is_not_converted_names_the_command(tmp_path, capsys, layout):
    source = tmp_path / "source"
    if layout == "llava":
        write_llava(source)
    else:
        write_published(source, raw={"model_type": "llava" if layout == "published" else "llava_llama"})
    for load in (VWLmmForCausalLM.from_pretrained, VWLmmConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"vwlmm convert {source} "):
            load(source)
    for verb, arguments in (
        ("generate", [str(source), str(NANO / "examples" / "0.png"), "--prompt", "what is this?"]),
        (
            "train",
            [*CPU, "--model", str(source), "--dataset", "easy-vqa/caption", "--output_dir", str(tmp_path / "out")],
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([verb, *arguments])
        assert stop.value.code == 2
        assert f"vwlmm convert {source} " in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_llava_of_transformers_stays_what_it_is(tmp_path):
    write_llava(tmp_path / "llava")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert LlavaConfig not in AutoModelForCausalLM._model_mapping
