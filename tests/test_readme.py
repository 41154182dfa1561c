"""The README's examples run, on tiny models in place of those they name."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPImageProcessorPil, CLIPVisionModel

from helpers import ROOT
from helpers.command_line import CPU
from helpers.conversations import tiny_processor
from helpers.conversion import write_llava
from helpers.hub_server import local_hub
from helpers.published import write_published
from helpers.tiny import tiny_config
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^vwlmm .*$", README, flags=re.MULTILINE)
CONVERSIONS = re.findall(r"`(vwlmm (?:convert|export) .* .*)`", README)


@pytest.fixture
def local(tmp_path, monkeypatch, model_folder, data):
    """Maps what the README names to what is here."""
    llm, tower = tmp_path / "llm", tmp_path / "tower"
    config = tiny_config()
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(llm)
    tokenizer = tiny_processor(config).tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(llm)
    CLIPVisionModel(config.vision_config).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    monkeypatch.chdir(tmp_path)
    names = {
        "runs/quickstart/joint": str(model_folder),
        "runs/7b/visual_words": str(model_folder),
        "runs/7b/align": str(model_folder),
        "runs/7b/joint": str(model_folder),
        "held_out.json": str(data),
        "--by kind": "--by question",
        "lmsys/vicuna-7b-v1.5": str(llm),
        "openai/clip-vit-large-patch14-336": str(tower),
        "recipes/": f"{ROOT}/recipes/",
        "hub_card/": f"{ROOT}/hub_card/",
        "learning_rate=2e-5": "use_cpu=True, bf16=False, max_steps=1, report_to='none'",
        "what color is the shape?": "w20 w21",
        "red circle": "w20 w21",
    }

    def replace(text):
        for name, here in names.items():
            text = text.replace(name, here)
        return text

    return replace


def test_the_first_example_needs_nothing_but_the_checkout(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len([line for line in PYTHON[0].splitlines() if line]) == 5
    exec(PYTHON[0], {})
    (said,) = re.findall("# (.+)", PYTHON[0])
    assert capsys.readouterr().out.strip() == said == "red"


def test_python_examples_run(local, capsys):
    _, use, ask, look, train = PYTHON
    variables = {}
    exec(local(use + ask + look), variables)
    patches = variables["model"].config.image_seq_length
    assert variables["words"].shape == (1, patches, 99) and isinstance(variables["answer"], str)
    assert Path("words.png").stat().st_size > 0
    exec(local(train), variables)
    assert variables["trainer"].state.global_step == 1


def test_conversions_run(local, tmp_path, capsys):
    write_published(tmp_path / "published")
    write_published(tmp_path / "llava-1.5", "LlavaLlamaForCausalLM", vm_head=False, tower_weights=False)
    write_llava(tmp_path / "llava-hf")
    here = {
        "MYTH-Lab/VW-LMM-Vicuna-7b": "published",
        "liuhaotian/llava-v1.5-7b": "llava-1.5",
        "llava-hf/llava-1.5-7b-hf": "llava-hf",
        "smollm2.gguf": "llm",
    }
    assert len(CONVERSIONS) == 9
    for command in CONVERSIONS:
        if "--to gguf" in command or "--to onnx" in command:  # no class of transformers loads these
            continue
        for name, folder in here.items():
            command = command.replace(f" {name} ", f" {folder} ")
        command = local(command)
        main(shlex.split(command)[1:])
        words = command.split()
        destination = words[3] if words[1] == "export" else words[-1]
        loaded = (AutoModelForImageTextToText if "--to llava" in command else AutoModelForCausalLM).from_pretrained(
            destination
        )
        assert loaded.config.model_type == ("llava" if "--to llava" in command else "vwlmm")


def test_commands_run(local, tmp_path, capsys, model_folder):
    assert [command.split()[1] for command in COMMANDS] == [
        *("generate", "words", "words", "index", "search", "train", "evaluate", "evaluate", "train", "merge", "push")
    ]
    for command in COMMANDS:
        arguments = shlex.split(local(command))[1:]
        if arguments[0] == "train":
            arguments += [*CPU, "--max_steps", "1", "--activation_checkpointing", "false"]
            arguments += ["--dataloader_num_workers", "0", "--per_device_train_batch_size", "2"]
            arguments += ["--gradient_accumulation_steps", "1", "--model", str(model_folder)]
        with local_hub(tmp_path) as hub:
            main(arguments)
    assert "model.safetensors" in hub.files("me/vw-lmm-easy-vqa")
    assert Path("words.png").stat().st_size > 0
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 1
    assert type(AutoModelForCausalLM.from_pretrained("merged")) is VWLmmForCausalLM
