"""Two processes train what one does, on the CPU (gloo): DDP, FSDP2 and, where DeepSpeed is installed, ZeRO."""

import json

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import is_deepspeed_available
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from helpers import ROOT
from helpers.tiny import tiny_model
from modeling_vwlmm.training_run import read_training_run
from two_processes import CASES, launch, write_bases


KINDS = ["ddp", "fsdp2", *(["zero2", "zero3"] if is_deepspeed_available() else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of every kind and case, and what the processes of each kind printed."""
    folder = tmp_path_factory.mktemp("runs")
    write_bases(folder)
    return folder, {kind: launch(kind, folder) for kind in ("one", *KINDS)}


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_training_without_padding_is_that_with_it(runs, kind):
    padded, found = (
        json.loads((runs[0] / name / case / "trainer_state.json").read_text())["log_history"]
        for name, case in (("one", "joint"), (kind, "padding-free"))
    )
    assert len(found) == len(padded) > 4
    for log, expected in zip(found, padded, strict=True):
        for name in expected.keys() & {"lm_loss", "vw_loss", "num_tokens", "eval_lm_loss", "eval_vw_loss"}:
            assert log[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5), (log["step"], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(runs, case, kind):
    folder, printed = runs
    for name in ("one", kind):
        assert printed[name].returncode == 0, printed[name].stderr[-3000:]
    states = [json.loads((folder / name / case / "trainer_state.json").read_text()) for name in ("one", kind)]
    expected, found = ([log for log in state["log_history"] if "loss" in log] for state in states)
    assert len(found) == len(expected) > 1
    for log, expected_log in zip(found, expected, strict=True):
        for name in ("loss", "lm_loss", "vw_loss", "grad_norm", "num_tokens"):
            assert log[name] == pytest.approx(expected_log[name], abs=1e-4), (log["step"], name)
        assert (log["vw_loss"] > 0) == (case != "align")
    evaluations = [next(log for log in state["log_history"] if "eval_lm_loss" in log) for state in states]
    for name in ("eval_lm_loss", "eval_vw_loss"):
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], abs=1e-4), name
    file = "adapter_model.safetensors" if "lora" in case else "model.safetensors"
    expected, found = (load_file(folder / name / case / file) for name in ("one", kind))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert read_training_run(folder / kind / case)[-1]["hardware"]["processes"] == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero3"])  # which is refused
def test_two_processes_answer_what_one_does(runs, kind):
    _, printed = runs
    answers = {
        name: [line for line in printed[name].stdout.splitlines() if line.startswith(("case ", "step ", "  '"))]
        for name in ("one", kind)
    }
    assert answers[kind] == answers["one"] and len(answers["one"]) > 8 * len(CASES)
    assert len({line.partition(", right")[0] for line in answers["one"]}) > 2 * len(CASES)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_two_processes_load_on_one_device(runs, case, kind):
    arguments, model, lora = CASES[case]
    folder = runs[0] / kind / case
    path = folder / f"checkpoint-{arguments.get('max_steps', 4)}"
    assert AutoProcessor.from_pretrained(path).chat_template and read_training_run(path)
    if lora:
        loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_model(**model), path))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    saved = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert saved and all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


def test_checkpoints_are_whole_where_accelerate_is_told_to_save_shards(tmp_path):
    write_bases(tmp_path)
    printed = launch("fsdp2", tmp_path, "resumed", options=["--fsdp_state_dict_type", "SHARDED_STATE_DICT"])
    assert printed.returncode == 0, printed.stderr[-3000:]
    path = tmp_path / "fsdp2" / "resumed" / "checkpoint-4"
    assert any(path.glob("pytorch_model_fsdp_*"))
    assert AutoProcessor.from_pretrained(path).chat_template and read_training_run(path)
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    saved = load_file(path.parent / "model.safetensors")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs_start_with_their_command_and_parse(path):
    command = path.read_text().splitlines()[0]
    launch, train = command.split(" -m modeling_vwlmm ")
    assert launch == f"# accelerate launch --config_file {path.relative_to(ROOT)}"
    recipe = ROOT / train.removeprefix("train --config ")
    assert recipe.is_file()
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED")
