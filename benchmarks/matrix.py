"""hub_card/vwlmm-nano with its own code, this package absent, on every minor release of transformers: `make matrix`.

Each release is installed into a folder of its own, `~/.cache/vwlmm/matrix/transformers-X`, and finds torch and pillow
in this environment. A cell is "ok" or what went wrong; "silent" says whether anything was written to stderr. Others
than `RELEASES` are run with `--releases`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "hub_card" / "vwlmm-nano"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vwlmm" / "matrix"
# The last release of each minor
RELEASES = ["5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"]
CHECKS = {}


def check(function):
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def load_by_path(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Nano:
    """The model, its processor, and a batch: a question about an image, one about two, and one about none."""

    def __init__(self):
        import torch
        from PIL import Image
        from transformers import AutoModelForCausalLM, AutoProcessor

        self.model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True).eval()
        self.processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
        self.images = [Image.open(NANO / "examples" / f"{i}.png").convert("RGB") for i in range(3)]
        texts = [self.prompt(images) for images in (1, 2, 0)]
        self.batch = self.processor(images=self.images, text=texts, padding=True, return_tensors="pt")
        self.batch = {name: self.batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        self.is_image = self.batch["input_ids"] == self.model.config.image_token_id
        labels = self.batch["input_ids"].masked_fill(self.is_image | (self.batch["attention_mask"] == 0), -100)
        self.labelled = {**self.batch, "labels": labels}
        self.torch = torch

    def prompt(self, images):
        content = [{"type": "image"}] * images + [{"type": "text", "text": "what color is the shape?"}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(self, model=None, **kwargs):
        return (model or self.model).generate(**self.batch, max_new_tokens=8, do_sample=False, **kwargs)

    def features(self):
        """The projected features, of the vision tower and the projector alone."""
        model = self.model.model
        hidden_states = model.vision_tower(self.batch["pixel_values"], output_hidden_states=True).hidden_states
        selected = hidden_states[self.model.config.vision_feature_layer]
        if selected.dim() == 4:
            selected = selected.flatten(2).transpose(1, 2)
        elif self.model.config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        projector = model.multi_modal_projector
        return projector.linear_2(projector.act(projector.linear_1(selected)))


@check
def load(nano):
    import transformers

    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"):
        model = getattr(transformers, name).from_pretrained(NANO, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), f"{name} gives {type(model)}"
        assert model.get_input_embeddings().weight.equal(nano.model.get_input_embeddings().weight), name


@check
def answer(nano):
    inputs = nano.processor(images=nano.images[0], text=nano.prompt(1), return_tensors="pt")
    tokens = nano.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = nano.processor.decode(tokens, skip_special_tokens=True).strip()
    assert found == "red", f"answered {found!r} instead of 'red'"


@check
def visual_words(nano):
    torch = nano.torch
    with torch.no_grad():
        words = nano.model.visual_words(nano.batch["pixel_values"])
        expected = nano.model.model.vm_head(nano.features()).softmax(-1)
    torch.testing.assert_close(words, expected)
    outputs = nano.model.model.get_image_features(nano.batch["pixel_values"], return_dict=True)
    torch.testing.assert_close(outputs.pooler_output, nano.features())


@check
def losses(nano):
    torch, is_image = nano.torch, nano.is_image
    naive_divergence = load_by_path(ROOT / "modeling_vwlmm" / "naive.py").naive_divergence
    out = nano.model(**nano.labelled)
    logits, shifted = out.logits[:, :-1], nano.labelled["labels"][:, 1:]
    lm_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    # An image that opens a row, or stands after padding alone, has a first patch that nothing precedes
    scored = is_image[:, 1:] & nano.batch["attention_mask"][:, :-1].bool()
    features = out.image_hidden_states.flatten(0, 1)[torch.cat([is_image[:, :1] & False, scored], 1)[is_image]]
    vw_loss = naive_divergence(logits[scored], nano.model.model.vm_head(features)) / scored.sum()
    torch.testing.assert_close(out.lm_loss, lm_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.vw_loss, vw_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, lm_loss + nano.model.config.visual_word_loss_weight * vw_loss)
    assert out.past_key_values is out.cache and out.past_key_values.get_seq_length() == is_image.shape[1]
    # The rows one after another, without padding
    kept = nano.batch["attention_mask"].bool()
    positions = nano.batch["attention_mask"].cumsum(1) - 1
    flat = {"input_ids": nano.batch["input_ids"], "labels": nano.labelled["labels"], "position_ids": positions}
    flat = {name: tensor[kept][None] for name, tensor in flat.items()}
    laid_out = nano.model(**flat, pixel_values=nano.batch["pixel_values"])
    torch.testing.assert_close(laid_out.logits[0], out.logits[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(laid_out.vw_loss, vw_loss, rtol=1e-4, atol=1e-5)


@check
def generation(nano):
    torch = nano.torch
    greedy = nano.answer()
    assert greedy.equal(nano.answer(use_cache=False)), "the cache changes the answers"
    for i, images in enumerate([nano.images[:1], nano.images[1:], None]):
        inputs = nano.processor(images=images, text=nano.prompt(len(images or [])), return_tensors="pt")
        single = nano.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        batched = greedy[i, nano.batch["input_ids"].shape[1] :][: len(single)]
        assert batched.equal(single), "a batch answers otherwise than its rows"
    with torch.no_grad():
        out = nano.model(**nano.batch, use_cache=True)
        tokens = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([nano.batch["attention_mask"], torch.ones_like(tokens)], 1)
        step = nano.model(input_ids=tokens, attention_mask=mask, past_key_values=out.past_key_values)
        whole = nano.model(
            **{**nano.batch, "input_ids": torch.cat([nano.batch["input_ids"], tokens], 1), "attention_mask": mask}
        )
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert nano.answer(num_beams=3).shape[0] == 3


@check
def save_and_load(nano):
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        nano.model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert loaded.state_dict().keys() == nano.model.state_dict().keys()
    for name, tensor in nano.model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    assert nano.answer(loaded).equal(nano.answer())


@check
def training_step(nano):
    torch = nano.torch
    model = nano.model.train()
    model.model.vision_tower.requires_grad_(False)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    before = model(**nano.labelled, use_cache=False).loss
    before.backward()
    without = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert not without, f"no gradient reaches {without}"
    optimizer.step()
    after = model(**nano.labelled, use_cache=False).loss
    assert after < before, f"a step took the loss from {before} to {after}"


def run_checks(release):
    """In a process of its own: what each check said, as the last line of stdout."""
    load_by_path(ROOT / "modeling_vwlmm" / "hub" / "load_check.py").hide_all_but(["torch", "transformers", "pillow"])
    import torch
    import transformers
    from transformers.utils import logging

    assert transformers.__version__ == release, f"found transformers {transformers.__version__}"
    logging.disable_progress_bar()
    torch.manual_seed(0)
    nano, found = None, {}
    for name, function in CHECKS.items():
        try:
            nano = nano or Nano()
            function(nano)
            found[name] = "ok"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(json.dumps(found))


def install(release):
    folder = CACHE / f"transformers-{release}"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-warn-conflicts"]
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:  # a folder that is there is whole
            subprocess.run([*pip, "--target", f"{scratch}/it", f"transformers=={release}"], check=True)
            os.rename(f"{scratch}/it", folder)
    return folder


def run_release(release):
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")},
            "PYTHONPATH": str(install(release)),
            "HF_MODULES_CACHE": scratch,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--run-checks", release]
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    found = json.loads(lines[-1]) if run.returncode == 0 and lines else {}
    errors = [line for line in run.stderr.splitlines() if line.strip()]
    return {**{name: found.get(name, "did not run") for name in CHECKS}, "silent": errors[-1] if errors else "ok"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--releases", nargs="+", default=RELEASES)
    parser.add_argument("--run-checks", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_checks:
        run_checks(arguments.run_checks)
        return
    columns = [*CHECKS, "silent"]
    print(f"| transformers | {' | '.join(columns)} | s |\n|{'---|' * (len(columns) + 2)}")
    wrong = False
    for release in arguments.releases:
        start = time.perf_counter()
        found = run_release(release)
        wrong |= any(result != "ok" for result in found.values())
        print(f"| {release} | {' | '.join(found.values())} | {time.perf_counter() - start:.0f} |", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
