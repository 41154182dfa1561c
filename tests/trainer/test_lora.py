"""LoRA: adapters on the LLM alone, one folder with all that was trained."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig

from helpers import ROOT
from helpers.adapters import SWITCHES, base_folder, logits_of, train
from helpers.conversations import conversations, tiny_processor
from helpers.tiny import LLMS, TOWERS, tiny_batch, tiny_model, without_labels
from helpers.training import sft_config
from modeling_vwlmm.arguments import LoraArguments
from modeling_vwlmm.cli import main
from modeling_vwlmm.trainer import VWLmmSFTTrainer


def adapted(model):
    return {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }


def linear_layers(llm):
    return {f"model.language_model.{name}" for name, m in llm.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_adapters_are_on_the_llm_alone(tmp_path, llm, tower):
    base = base_folder(tmp_path, llm=llm, tower=tower)
    model = train(tmp_path, base, max_steps=1).model
    base_model = model.get_base_model()
    lora = {
        name.replace(".base_layer", "")
        for name in linear_layers(base_model.model.language_model)
        if "lora_" not in name
    }
    assert adapted(model) == lora and len(lora) == 14
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained and all("multi_modal_projector.modules_to_save.default" in name for name in trained)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_pass_through(tmp_path, switch):
    model = train(tmp_path, lora=SWITCHES[switch], max_steps=1).model
    found = adapted(model)
    assert found and all(name.startswith("model.language_model.") for name in found)
    layers = {name.rpartition(".")[2] for name in found}
    if switch == "two":
        assert layers == {"q_proj", "v_proj"}
    elif switch == "not one":
        assert "q_proj" not in layers and len(layers) == 6
    elif switch == "one layer":
        assert found == {"model.language_model.layers.1.self_attn.q_proj"}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (switch == "dora") == any("lora_magnitude_vector" in name for name in names)


def test_a_regular_expression_reaches_the_parts_that_it_names(tmp_path):
    model = train(tmp_path, lora={"target_modules": r".*(vision_tower|language_model).*\.q_proj"}, max_steps=1).model
    assert {name.split(".")[1] for name in adapted(model)} == {"vision_tower", "language_model"}


WHOLE = {
    "joint": ({"stage": "joint"}, {"multi_modal_projector"}),
    "with the VM head": (
        {"stage": "joint", "trainable": ["projector", "language_model", "vm_head"]},
        {"multi_modal_projector", "vm_head"},
    ),
    "with the tower": (
        {"stage": "instruct", "trainable": ["vision_tower", "language_model"]},
        {"vision_tower"},
    ),
    "the LLM alone": ({"trainable": ["language_model"]}, set()),
    "no stage": ({"stage": None}, set()),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_trains_whole(tmp_path, case):
    arguments, expected = WHOLE[case]
    base = base_folder(tmp_path)
    trainer = train(tmp_path, base, **arguments)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in saved if "lora_" not in name} == expected
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in trainer.model.get_base_model().state_dict().items()
    }
    # What was there before stays as it was
    assert before.keys() <= after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_stage_without_the_llm_needs_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="what trains is vm_head: use no PEFT here"):
        train(tmp_path, stage="visual_words")


def test_the_visual_word_loss_is_in(tmp_path):
    """Its gradient reaches the adapters and the projector: with another weight they get another one."""
    gradients = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        trainer = train(folder, visual_word_loss_weight=weight, max_steps=1, lora={"init_lora_weights": False})
        assert (trainer.state.log_history[0]["vw_loss"] > 0) == (weight > 0)
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        gradients[weight] = weights
    different = {name for name in gradients[0.0] if not torch.equal(gradients[0.0][name], gradients[1.0][name])}
    assert {name.split(".")[3] for name in different} == {"language_model", "multi_modal_projector"}


PEFT_ALONE = """
import sys, torch
import modeling_vwlmm
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, adapter, batch, logits = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(batch)).logits}, logits)
"""


def test_one_folder_holds_all(tmp_path):
    """In a fresh process with PEFT's own calls, and in one call of transformers."""
    model = train(tmp_path, trainable=["projector", "language_model", "vm_head"]).model
    batch = without_labels(tiny_batch(model.config))
    save_file(batch, tmp_path / "batch")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "batch", "logits")]
    subprocess.run([sys.executable, "-c", PEFT_ALONE, *arguments], check=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits_of(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))
    pixel_values = batch["pixel_values"]
    assert torch.equal(loaded.visual_words(pixel_values), model.get_base_model().visual_words(pixel_values))
    assert AutoProcessor.from_pretrained(tmp_path / "adapter").image_token == "<image>"


LOADS = {
    "peft": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("key", ["linear_1.bias", "lora_A.weight", "extra"])
def test_a_key_too_few_or_too_many(tmp_path, key, load):
    train(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    if key == "extra":
        weights["base_model.model.model.language_model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 16)
        message = "unexpected: .*layers.7"
    else:
        name = next(name for name in weights if name.endswith(key))
        del weights[name]
        message = key.split(".")[0]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, KeyError), match=message):  # PEFT's own is a KeyError
        LOADS[load](tmp_path / "base", tmp_path / "adapter")


def test_a_second_adapter_beside_the_first(tmp_path):
    model = train(tmp_path).model
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model), logits_of(LOADS["peft"](tmp_path / "base", tmp_path / "adapter")))


@pytest.mark.parametrize("name", ["default", "en", "head", "norm", "a", "weight", "lora_A"])
def test_an_adapter_may_have_a_name_that_weights_have_too(tmp_path, name):
    model = train(tmp_path, max_steps=1).model
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"), adapter_name=name)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_pefts_auto_class_loads_an_adapter_and_its_base(tmp_path):
    base = base_folder(tmp_path)
    args = sft_config(tmp_path / "adapter", stage="joint", max_steps=1, learning_rate=0.1)
    trainer = VWLmmSFTTrainer(str(base), args, train_dataset=conversations(), peft_config=LoraConfig(r=16))
    trainer.train()
    trainer.save_model()
    # It makes room for all tokens of the tokenizer in the folder, of which the last is the image token
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))


def test_pseudo_image_features_that_an_adapter_could_not_tell(tmp_path):
    base = base_folder(tmp_path)
    with pytest.raises(ValueError, match="base has pseudo_image_features False: change it there"):
        train(tmp_path, base, model_init_kwargs={"pseudo_image_features": True})
    train(tmp_path, base_folder(tmp_path / "other", pseudo_image_features=True))


def test_an_adapter_is_merged_before_it_is_trained_on(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=f"vwlmm merge {tmp_path}/adapter NEW_FOLDER"):
        train(tmp_path, tmp_path / "adapter")


@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_recipes_run_and_merge(tmp_path, model_folder, data, recipe):
    """In bfloat16, on the CPU."""
    flags = {"model": model_folder, "dataset": data, "image_folder": data.parent / "images"}
    flags |= {"output_dir": tmp_path / "adapter", "use_cpu": True, "max_steps": 2, "learning_rate": 0.01}
    flags |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    main(["train", "--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *flags])
    logs = json.loads((tmp_path / "adapter" / "trainer_state.json").read_text())["log_history"]
    assert logs[-1]["step"] == 2
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", model_folder))
    changed = {
        name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert len(changed) == 14 + 4  # the LLM's linear layers, and the projector


def test_what_trains_whole_trains_in_float32(tmp_path):
    trainer = train(tmp_path, bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    # And what it made can be looked at on the way, where nothing casts by itself
    batch = without_labels(tiny_batch(trainer.model.config, padding="left"))
    assert trainer.model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2
    assert trainer.model.get_base_model().visual_words(batch["pixel_values"]).dtype == torch.float32


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_qlora(tmp_path, bits):
    """On bitsandbytes' CPU path: all but the LLM stays as it is, and its adapter merges into the unquantized base."""
    base = base_folder(tmp_path)
    trainer = VWLmmSFTTrainer(
        str(base),
        sft_config(tmp_path / "adapter", stage="joint", learning_rate=0.01, max_steps=3),
        train_dataset=conversations(),
        peft_config=LoraConfig(r=2),
        quantization_config=BitsAndBytesConfig(**{bits: True}),
    )
    quantized = {name for name, p in trainer.model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(quantized) == 14 and all("language_model" in name for name in quantized)
    trainer.train()
    trainer.save_model()
    losses = [log["vw_loss"] for log in trainer.state.log_history if "vw_loss" in log]
    assert losses[0] > 0
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(base)
    assert merged.dtype == torch.float32
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "model.language_model.layers.0.self_attn.q_proj"
    delta = (
        4
        * adapter[f"base_model.model.{stem}.lora_B.weight"].float()
        @ adapter[f"base_model.model.{stem}.lora_A.weight"].float()
    )
    expected = before.state_dict()[f"{stem}.weight"] + delta
    torch.testing.assert_close(merged.state_dict()[f"{stem}.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config_class", [BitsAndBytesConfig, dict])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_heads_are_not_quantized_whoever_loads(tmp_path, bits, config_class):
    config = config_class(**{bits: True})
    base = base_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    if config_class is dict:
        assert config == {bits: True}  # the user's own stays as it is
    else:
        assert config.llm_int8_skip_modules is None
    model.save_pretrained(tmp_path / "saved")
    before = AutoModelForCausalLM.from_pretrained(base)
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert loaded.model.language_model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
        assert torch.equal(loaded.model.vm_head.weight, before.model.vm_head.weight)
        assert torch.equal(loaded.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("stage", ["align", "visual_words"])
def test_layers_that_are_named_do_not_train_in_a_stage_without_the_llm(tmp_path, stage):
    model = tiny_model()
    with pytest.raises(ValueError, match="an adapter trains the language_model, but what trains is"):
        VWLmmSFTTrainer(
            model,
            sft_config(tmp_path, stage=stage),
            train_dataset=conversations(),
            processing_class=tiny_processor(model.config),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )


def test_a_command_line_names_layers_by_an_expression_or_their_ends():
    for given, expected in (
        (["q_proj"], {"q_proj"}),
        (["model.language_model.layers.0.self_attn.q_proj"], {"model.language_model.layers.0.self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["all-linear"], "all-linear"),
    ):
        assert LoraArguments(use_peft=True, lora_target_modules=given).peft_config().target_modules == expected


def test_a_command_line_names_all_linear_layers_and_more_fields():
    config = LoraArguments(use_peft=True, lora_target_modules=["all-linear"], lora_kwargs='{"use_rslora": true}')
    config.use_rslora = False
    with pytest.raises(ValueError, match="lora_kwargs do not fit"):
        config.peft_config()  # given twice
    config.lora_kwargs = '{"lora_bias": false}'
    assert config.peft_config().target_modules == "all-linear"
