"""What the benchmark compares, each in a process of its own that runs when it is told to."""

import contextlib
import ctypes
import gc
import importlib.util
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, List, disable_progress_bars
from peft import LoraConfig
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM
from modeling_vwlmm.naive import naive_divergence, naive_visual_word_loss
from modeling_vwlmm.processing import make_processor
from modeling_vwlmm.stages import train_only
from modeling_vwlmm.trainer import VWLmmSFTConfig, VWLmmSFTTrainer
from modeling_vwlmm.visual_word_loss import scored_positions, visual_word_loss


LOSSES = ("ours", "naive", "bare", "liger")
# "text alone" is b without its loss. TRL's own trainer differs from it in that, on a CPU, it builds the logits of all
# positions and not only those of the labels
STEPS = ("a: TRL", "text alone", "b: joint", "c: VM head", "d: naive", "forward")
GENERATIONS = ("LLaVA", "ours")
QUESTION, ANSWER, NEW_TOKENS = 24, 32, 32
WORDS = 1000
BARE_ROWS = 1024

disable_progress_bars()
warnings.filterwarnings("ignore", category=FutureWarning)


class Meter:
    """Seconds and peak bytes between `start` and `stop`; on Linux's CPUs the process's resident memory."""

    def __init__(self, device):
        self.device = device

    def start(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = self._resident("VmRSS")
        self.started = time.perf_counter()

    def stop(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident("VmHWM")
        return seconds, peak

    @staticmethod
    def _resident(field):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status[field].split()[0])


def serve(pipe, meter, run, parameters=()):
    """Run when told to. With parameters, the memory is what comes on top of them and of their gradients."""
    run()
    pipe.send("ready")
    while pipe.recv() == "go":
        for parameter in parameters:
            parameter.grad = None
            parameter.detach().sum()  # back in memory, which may have been taken from an idle process
        meter.start()
        run()
        seconds, peak = meter.stop()
        apart = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
        pipe.send((seconds, peak - (meter.before + apart if parameters else 0)))


# The loss alone


def liger(h, lm_head, f, vm_head, target):
    from liger_kernel.transformers import LigerFusedLinearJSD

    # At beta 0 it is KL(teacher || student), and no gradient reaches the teacher
    student, teacher = ((h, lm_head), (f, vm_head)) if target == "visual_words" else ((f, vm_head), (h, lm_head))
    return len(h) * LigerFusedLinearJSD(jsd_beta=0.0)(*student, *(tensor.detach() for tensor in teacher))


def bare_products(h, lm_head, f, vm_head):
    """The matrix products of the loss and its gradients into buffers that are there already."""
    rows = min(BARE_ROWS, len(h))
    heads = [
        (x, w, torch.empty(rows, len(w), dtype=x.dtype, device=x.device), torch.empty_like(x), torch.zeros_like(w))
        for x, w in ((h, lm_head), (f, vm_head))
    ]

    def run():
        for start in range(0, len(h), rows):
            for x, w, logits, x_grad, w_grad in heads:
                x, x_grad = x[start : start + rows], x_grad[start : start + rows]
                tile = logits[: len(x)]
                torch.mm(x.detach(), w.detach().T, out=tile)
                if x.requires_grad:
                    torch.mm(tile, w.detach(), out=x_grad)
                if w.requires_grad:
                    w_grad.addmm_(tile.T, x.detach())

    return run


def loss_alone(pipe, spec):
    if spec["loss"] == "liger" and not (spec["device"] == "cuda" and importlib.util.find_spec("liger_kernel")):
        return
    torch.manual_seed(0)
    n, d, vocab_size = spec["n"], spec["d"], spec["vocab_size"]
    is_joint, trains_heads = spec["target"] == "visual_words", not spec.get("frozen_heads")
    shapes = {"h": ((n, d), is_joint), "lm_head": ((vocab_size, d), is_joint and trains_heads),
              "f": ((n, d), is_joint), "vm_head": ((vocab_size, d), trains_heads or not is_joint)}  # fmt: skip
    inputs = [
        (torch.randn(shape, device=spec["device"]) * (1 if name in "hf" else d**-0.5))
        .to(getattr(torch, spec["dtype"]))
        .requires_grad_(needs_grad)
        for name, (shape, needs_grad) in shapes.items()
    ]
    losses = {
        "ours": lambda *inputs: visual_word_loss(*inputs, target=spec["target"]),
        "naive": lambda *inputs: naive_visual_word_loss(*inputs, target=spec["target"]),
        "liger": lambda *inputs: liger(*inputs, spec["target"]),
    }

    run = bare_products(*inputs) if spec["loss"] == "bare" else lambda: losses[spec["loss"]](*inputs).backward()
    with contextlib.suppress(torch.OutOfMemoryError):
        serve(pipe, Meter(spec["device"]), run, parameters=inputs[1::2])


# Training steps


def configs(spec):
    vision_config = CLIPVisionConfig(**spec["tower"], image_size=336, patch_size=14)
    text_config = LlamaConfig(**spec["llm"], vocab_size=spec["vocab_size"], pad_token_id=0, bos_token_id=1,
                              eos_token_id=2, tie_word_embeddings=False)  # fmt: skip
    shared = {"vision_config": vision_config, "text_config": text_config, "image_token_index": WORDS}
    return VWLmmConfig(**shared), LlavaConfig(**shared)


def build(spec, is_ours):
    torch.manual_seed(0)
    config = configs(spec)[0 if is_ours else 1]
    with torch.device(spec["device"]):
        return (VWLmmForCausalLM if is_ours else LlavaForConditionalGeneration)._from_config(
            config, dtype=getattr(torch, spec["dtype"])
        )


def processor_of(spec):
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}"
        "{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return make_processor(configs(spec)[0], tokenizer, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def dataset_of(rows):
    def text(count, start):
        return " ".join(f"w{start + i}" for i in range(count))

    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    row = {
        "images": [PILImage.fromarray(pixels)],
        "prompt": [{"role": "user", "content": text(QUESTION, 10)}],
        "completion": [{"role": "assistant", "content": text(ANSWER, 100)}],
    }
    return Dataset.from_list([row] * rows).cast_column("images", List(Image()))


def published_visual_word_loss(self, outputs, image_mask, attention_mask=None, position_ids=None):
    """As the published code has it: logits of all positions, and distributions of whole batches."""
    positions = scored_positions(image_mask, attention_mask, position_ids)
    z = self.lm_head(outputs.last_hidden_state).float()
    u = self.model.vm_head(outputs.image_hidden_states).float().flatten(0, 1)
    return naive_divergence(z[:, :-1][positions[:, 1:]], u[positions[image_mask]]), positions.sum()


def no_visual_word_loss(self, outputs, image_mask, attention_mask=None, position_ids=None):
    return 0 * outputs.last_hidden_state.sum(), torch.ones((), device=outputs.last_hidden_state.device)


class Turns(TrainerCallback):
    """A step when it is told to, the first one at once: it makes the optimizer's state."""

    def __init__(self, pipe, meter):
        self.pipe, self.meter = pipe, meter

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.pipe.send("ready")
        if state.global_step > 0:
            if self.pipe.recv() != "go":
                sys.exit()
            self.meter.start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_seconds = time.perf_counter() - self.optimizer_began

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.pipe.send((*self.meter.stop(), self.optimizer_seconds))


def make_trainer(pipe, spec, meter):
    is_ours = spec["step"] != "a: TRL"
    model = build(spec, is_ours)
    folder = spec["step"].partition(":")[0]  # variants that take turns need folders of their own
    arguments = dict(output_dir=folder, per_device_train_batch_size=spec["batch_size"], max_steps=10_000,
                     max_length=None, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                     use_cpu=spec["device"] == "cpu", bf16=spec["dtype"] == "bfloat16")  # fmt: skip
    peft_config = None
    if spec["lora"] and not spec["step"] == "c: VM head":
        layers = r"model\.language_model\..*_proj"
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=64,
            lora_alpha=128,
            target_modules=layers,
            modules_to_save=["multi_modal_projector"],
        )
    if is_ours:
        args = VWLmmSFTConfig(**arguments, stage="visual_words" if spec["step"] == "c: VM head" else "joint")
        replaced = {"d: naive": published_visual_word_loss, "text alone": no_visual_word_loss}
        if spec["step"] in replaced:
            model.visual_word_loss = types.MethodType(replaced[spec["step"]], model)
    else:
        args = SFTConfig(**arguments)
        if peft_config is None:
            train_only(model, ["projector", "language_model"])
    return (VWLmmSFTTrainer if is_ours else SFTTrainer)(
        model,
        args,
        train_dataset=dataset_of(4 * spec["batch_size"]),
        processing_class=processor_of(spec),
        peft_config=peft_config,
        callbacks=[Turns(pipe, meter)],
    )


def training_step(pipe, spec):
    meter = Meter(spec["device"])
    with contextlib.suppress(torch.OutOfMemoryError):
        trainer = make_trainer(pipe, spec, meter)
        if spec["step"] != "forward":
            trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        inputs = {name: tensor.to(spec["device"]) for name, tensor in batch.items() if name != "labels"}

        def run():
            with torch.no_grad(), torch.autocast(spec["device"], torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
                trainer.model.model(**inputs)

        serve(pipe, meter, run)


# Generation


def generation(pipe, spec):
    is_ours = spec["model"] == "ours"
    model = build(spec, is_ours).eval()
    processor = processor_of(spec)
    pixels = np.zeros((336, 336, 3), dtype=np.uint8)
    inputs = processor(images=PILImage.fromarray(pixels), text="w3 <image> w4 w5", return_tensors="pt")
    inputs = inputs.to(spec["device"], getattr(torch, spec["dtype"]))

    def run():
        model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)

    serve(pipe, Meter(spec["device"]), run)
