"""Pushed over HTTP to a server on this machine, then pulled by a stranger into an empty cache."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from helpers import CODE
from helpers.adapters import logits_of
from helpers.conversations import picture, tiny_processor
from helpers.hub_server import TOKEN, environment, local_hub
from helpers.tiny import tiny_batch, tiny_model, without_labels
from modeling_vwlmm.cli import main
from modeling_vwlmm.hub import load_check


HOST = "anns-desktop"
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def records_of(folder):
    """What a training run leaves in its folder, with the name of this machine, paths and a token in it."""
    state = {
        "best_model_checkpoint": str(folder / "checkpoint-5"),
        "log_history": [{"step": 1, "loss": 2.5, "note": f"ran on {HOST} in {folder}/logs, rank 0"}],
    }
    run = [{"stage": "joint", "base_model": str(folder.parent / "instruct"), "recipe": {"hub_token": TOKEN}}]
    for name, content in {"trainer_state.json": state, "training_run.json": run}.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "notes.txt", ".env"):
        (folder / name).write_text(TOKEN)
    for name in ("checkpoint-5", "runs"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A server with a model in shards, an adapter of it and the two merged, and their folders."""
    tmp_path = tmp_path_factory.mktemp("published")
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    records_of(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    whole = ["multi_modal_projector", "vm_head"]
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False)
    adapter = get_peft_model(base, lora)
    with torch.no_grad():
        adapter.base_model.model.model.vm_head.modules_to_save["default"].weight.mul_(2)
    adapter.save_pretrained(tmp_path / "adapter")
    tiny_processor(model.config).save_pretrained(tmp_path / "adapter")
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with local_hub(tmp_path_factory.mktemp("cache")) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HOST)
        main(["push", str(tmp_path / "model"), "model"])
        main(["push", str(tmp_path / "adapter"), "me/adapter", "--base-model", "me/model"])
        main(["push", str(tmp_path / "merged"), "me/merged", "--private"])
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        yield hub, tmp_path


def test_what_is_pushed_and_what_is_not(published):
    hub, folder = published
    model = {"config.json", "generation_config.json", "README.md", ".gitattributes", *CODE, *PROCESSOR}
    records = {"trainer_state.json", "training_run.json"}
    shards = {path.name for path in (folder / "model").glob("model-*.safetensors")}
    assert len(shards) > 1
    expected = model | records | shards | {"model.safetensors.index.json"}
    assert {path for path in hub.files("me/model") if not path.startswith("assets/")} == expected
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes", *PROCESSOR}
    assert {path for path in hub.files("me/adapter") if not path.startswith("assets/")} == adapter
    assert hub.repos["me/merged"].private and not hub.repos["me/model"].private
    for repo in hub.repos:
        assert list(hub.repos[repo].titles.values()) == ["initial commit", "Upload model"]
    for shard in shards:
        assert hub.files("me/model")[shard] == (folder / "model" / shard).read_bytes()


def test_nothing_private_is_in_it(published):
    hub, folder = published
    for repo in hub.repos:
        for path, content in hub.files(repo).items():
            text = content.decode(errors="replace")
            for word in (TOKEN, str(folder), str(Path.home()) + "/", HOST):
                assert word not in text or path == "tokenizer.json", f"{word} in {path} of {repo}"
    files = hub.files("me/model")
    assert json.loads(files["training_run.json"])[0]["base_model"] == "instruct"
    note = json.loads(files["trainer_state.json"])["log_history"][0]["note"]
    assert note == "ran on host in logs, rank 0"
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == "me/model"


def test_the_card(published):
    hub, _ = published
    for repo in hub.repos:
        card = ModelCard(hub.files(repo)["README.md"].decode())
        assert card.data.pipeline_tag == "image-text-to-text" and "vwlmm" in card.data.tags


STRANGER = """
import importlib.util, json, sys
check, repo, batch, output, picture, *more = sys.argv[1:]
spec = importlib.util.spec_from_file_location("load_check", check)
load_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load_check)
load_check.hide_all_but(["torch", "transformers", "pillow", *more])
for name in ("modeling_vwlmm", "trl", "datasets", *([] if more else ["peft", "accelerate"])):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is there")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
)

batch = load_file(batch)
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained(repo, trust_remote_code=True).eval()
    assert type(model).__name__ == "VWLmmForCausalLM" and type(model).__module__.startswith("transformers_modules.")
if not more:
    assert type(AutoModel.from_pretrained(repo, trust_remote_code=True)).__name__ == "VWLmmModel"
    assert AutoConfig.from_pretrained(repo, trust_remote_code=True).model_type == "vwlmm"
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
messages = [{"role": "user", "content": [
    {"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "w20 w21"}
]}]
pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
answer = pipe(text=messages, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    save_file({
        "logits": model(**batch).logits,
        "words": model.visual_words(batch["pixel_values"]),
        "generated": model.generate(**inputs, max_new_tokens=5, do_sample=False),
    }, output)
print(json.dumps(answer))
"""


def local(folder, kind):
    if kind != "adapter":
        return AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / kind).eval()


@pytest.mark.parametrize("kind", ["model", "merged", "adapter"])
def test_a_stranger_without_this_package(published, tmp_path, kind):
    """In place of an environment of its own, whose installation takes minutes, a process that finds no package but
    torch, transformers and pillow (and peft for the adapter), what they require, and the standard library."""
    hub, folder = published
    model = local(folder, kind)
    batch = without_labels(tiny_batch(model.config))
    save_file(batch, tmp_path / "batch")
    picture(0).save(tmp_path / "picture.png")
    arguments = [load_check.__file__, f"me/{kind}", "batch", "output", "picture.png"]
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments, *(["peft"] if kind == "adapter" else [])],
        env=environment(hub, tmp_path / "cache"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    found = load_file(tmp_path / "output")
    assert torch.equal(found["logits"], logits_of(model))
    assert torch.equal(found["words"], model.visual_words(batch["pixel_values"]))
    processor = AutoProcessor.from_pretrained(folder / kind)
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "w20 w21"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(found["generated"], generated)
    new = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(run.stdout).split() == new.split()


WITH_THE_PACKAGE = """
import sys, torch
import modeling_vwlmm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
batch = load_file(sys.argv[1])
with torch.no_grad():
    save_file({
        kind: AutoModelForCausalLM.from_pretrained(f"me/{kind}").eval()(**batch).logits
        for kind in ("model", "adapter", "merged")
    }, sys.argv[2])
"""


def test_with_this_package(published, tmp_path):
    hub, folder = published
    save_file(without_labels(tiny_batch(local(folder, "model").config)), tmp_path / "batch")
    arguments = [sys.executable, "-c", WITH_THE_PACKAGE, tmp_path / "batch", tmp_path / "output"]
    subprocess.run(arguments, env=environment(hub, tmp_path / "cache"), check=True)
    for kind, logits in load_file(tmp_path / "output").items():
        assert torch.equal(logits, logits_of(local(folder, kind)))


PINNED = """
import json, sys
from transformers import AutoModelForCausalLM
for repo, pinned in json.loads(sys.argv[1]):
    try:
        print(type(AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **pinned)).__name__)
    except RuntimeError as error:
        print(error)
"""


def test_a_revision_pins_the_code(published, tmp_path):
    """That of an adapter is its base model's, and it takes `adapter_kwargs` for its own."""
    hub, _ = published
    calls = []
    for repo, pinned in (("me/merged", {}), ("me/model", {"revision": hub.repos["me/adapter"].refs["main"]})):
        commits = hub.repos[repo]
        first = commits.refs["main"]
        commits.commit(
            "other", {**commits.commits[first], "modeling_vwlmm.py": b"raise RuntimeError('other')"}, "other"
        )
        for revision in (first, "other"):
            loaded = "me/adapter" if pinned else repo
            calls.append([loaded, {"revision": revision, "adapter_kwargs": pinned or None}])
    run = subprocess.run(
        [sys.executable, "-c", PINNED, json.dumps(calls)],
        env=environment(hub, tmp_path / "cache"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert run.stdout.split() == 2 * ["VWLmmForCausalLM", "other"]
