"""The memory that a recipe takes, measured on the machine that this runs on, or computed.

python benchmarks/memory.py --llm 7B --recipe qlora
    trains some steps of a random model of that size, with CLIP ViT-L/14 at 336 px, as recipes/qlora.yaml says, and
    prints the most memory that it took. A batch is one image and 128 tokens, if --batch_size says no other.
python benchmarks/memory.py --compute
    prints the bytes of all weights, gradients and optimizer states; what a step computes comes on top.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import datasets
import PIL.Image
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import TrlParser

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM
from modeling_vwlmm.arguments import LoraArguments, TrainArguments
from modeling_vwlmm.processing import make_processor, read_chat_template
from modeling_vwlmm.stages import STAGES, train_only
from modeling_vwlmm.trainer import VWLmmSFTConfig, VWLmmSFTTrainer
from modeling_vwlmm.trainer.lora import NOT_QUANTIZED, for_language_model


RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE_OF = {"full": "stage4_joint.yaml", "lora": "lora.yaml", "qlora": "qlora.yaml"}
LLMS = {
    # SmolLM2-135M, Llama-3.2-1B, Vicuna-7B
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWER |= {"image_size": 336, "patch_size": 14}
# Bytes of a weight in 4 bits: a scale for 64 of them, in 8 bits with a scale of its own for 256
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


def config_of(llm):
    return VWLmmConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**LLMS[llm], max_position_embeddings=4096),
        vision_feature_layer=-2,
        image_token_index=LLMS[llm]["vocab_size"],
    )


def arguments_of(recipe, *overrides):
    parser = TrlParser((TrainArguments, VWLmmSFTConfig, LoraArguments))
    return parser.parse_args_and_config(["--config", str(RECIPES / RECIPE_OF[recipe]), *overrides])


def compute(llm, recipe):
    """Bytes of weights, gradients and AdamW's states."""
    _, args, lora = arguments_of(recipe, "--use_cpu", "true", "--bf16", "false")
    with torch.device("meta"):
        model = VWLmmForCausalLM(config_of(llm))
    if not lora.use_peft:
        train_only(model, STAGES[args.stage]["trainable"])
        return sum(parameter.numel() * (16 if parameter.requires_grad else 4) for parameter in model.parameters())
    model = get_peft_model(model, for_language_model(lora.peft_config(), STAGES[args.stage]["trainable"]))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    total = 0
    for name, parameter in model.named_parameters():
        module = name.removeprefix("base_model.model.").rpartition(".")[0]
        if parameter.requires_grad:
            # What trains whole is in float32, and so is an adapter but for QLoRA's
            size = 8 if "lora_" in name and lora.load_in_4bit else 16
        elif lora.load_in_4bit and name.rpartition(".")[0] in linear and not module.startswith(tuple(NOT_QUANTIZED)):
            size = FOUR_BITS
        else:
            size = 2
        total += size * parameter.numel()
    return total


def write_model(folder, llm, dtype, device):
    config = config_of(llm)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = VWLmmForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "w": 3}, unk_token="w"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_tokens([f"unused{i}" for i in range(4, config.image_token_id)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w"
    )
    tokenizer.chat_template = read_chat_template("vicuna_v1")
    make_processor(config, tokenizer, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def samples(count, text_tokens):
    answer = {"role": "assistant", "content": " ".join(["w"] * text_tokens)}
    row = {"images": [PIL.Image.new("RGB", (336, 336))], "messages": [{"role": "user", "content": "w"}, answer]}
    dataset = datasets.Dataset.from_list([row] * count)
    return dataset.cast_column("images", datasets.List(datasets.Image()))


class AnonymousMemory(threading.Thread):
    """The most memory of this process that is no file's, looked at a hundred times a second (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = self.now()
        self.start()

    def now(self):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def run(self):
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.01)


def measure(llm, recipe, batch_size, text_tokens, steps):
    on_gpu = torch.cuda.is_available()
    overrides = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    overrides |= {} if on_gpu else {"use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        overrides["output_dir"] = folder
        flags = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
        _, args, lora = arguments_of(recipe, *flags)
        write_model(folder, llm, torch.bfloat16 if lora.use_peft else torch.float32, args.device)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        memory = None if on_gpu else AnonymousMemory()
        trainer = VWLmmSFTTrainer(
            folder,
            args,
            train_dataset=samples(batch_size * steps, text_tokens),
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=lora.peft_config(),
            quantization_config=lora.quantization_config(torch.bfloat16),
        )
        if not on_gpu:
            for parameter in trainer.model.parameters():
                if type(parameter) is torch.nn.Parameter:  # read from the checkpoint where it lies, unlike on a GPU
                    parameter.data = parameter.data.clone()
        trainer.train()
    if on_gpu:
        return torch.cuda.max_memory_reserved(), torch.cuda.get_device_name()
    return memory.most - memory.before, "CPU"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", action="store_true")
    parser.add_argument("--llm", choices=LLMS, default="135M")
    parser.add_argument("--recipe", choices=RECIPE_OF, default="lora")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.compute:
        print(f"{'GiB':8}" + "".join(f"{recipe:>8}" for recipe in RECIPE_OF))
        for llm in LLMS:
            print(f"{llm:8}" + "".join(f"{compute(llm, recipe) / 2**30:8.1f}" for recipe in RECIPE_OF))
        return
    sizes = arguments.batch_size, arguments.text_tokens, arguments.steps
    most, where = measure(arguments.llm, arguments.recipe, *sizes)
    print(f"{arguments.llm}, {arguments.recipe}, {sizes[0]} image(s) and {sizes[1]} tokens each, a step on {where}:")
    print(f"{most / 2**30:.1f} GiB, of which weights, gradients and optimizer are computed to be ", end="")
    print(f"{compute(arguments.llm, arguments.recipe) / 2**30:.1f}")


if __name__ == "__main__":
    main()
