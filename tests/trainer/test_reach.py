"""Adapters reach what they name: nothing else outside of the LLM trains, and what trained is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from helpers.adapters import base_folder, logits_of, train
from helpers.conversations import conversations, tiny_processor
from helpers.training import sft_config
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.conversion.merge import merge
from modeling_vwlmm.trainer import VWLmmSFTTrainer


LLM, TOWER, PROJECTOR = "model.language_model", "model.vision_tower", "model.multi_modal_projector"
# What a config selects, and the parts that it reaches beside the projector, which trains whole in the stage
REACHES = {
    "bias": ({"bias": "all"}, {LLM}),
    "bias of named modules": ({"bias": "all", "target_modules": ["q_proj"]}, {LLM}),
    "expression": ({"target_modules": r".*\.(q_proj|query|convolution|mlp\.fc1)"}, {LLM}),
    "expression in capitals": ({"target_modules": "ALL-LINEAR"}, {LLM}),
    "expression that names the tower": (
        {"target_modules": r".*(language_model|vision_tower).*(q_proj|convolution)"},
        {LLM, TOWER},
    ),
    "entry that names the projector": (
        {"target_modules": ["q_proj", "multi_modal_projector.linear_1"], "modules_to_save": []},
        {LLM, PROJECTOR},
    ),
    "parameters": ({"target_parameters": ["q_proj.weight"]}, {LLM}),
    "norms of the LLM": ({"modules_to_save": ["norm"]}, {LLM}),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, {LLM}),
    "the tower whole": ({"modules_to_save": ["vision_tower"]}, {LLM, TOWER}),
}
CASES = [(case, "resnet") for case in REACHES] + [("expression", "clip"), ("norms of the LLM", "clip")]


def parts_of(names):
    return {
        part for name in names for part in (LLM, TOWER, PROJECTOR, "model.vm_head", "lm_head") if name.startswith(part)
    }


def statistics_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running_" in name}


@pytest.mark.parametrize("case, tower", CASES)
def test_what_a_config_reaches_trains_and_is_saved(tmp_path, case, tower):
    lora, expected = REACHES[case]
    if "modules_to_save" not in lora:
        expected = expected | {PROJECTOR}
    base = base_folder(tmp_path, tower=tower, tie_word_embeddings=False)
    before = AutoModelForCausalLM.from_pretrained(base)
    trainer = train(tmp_path, base, lora={"init_lora_weights": False, **lora})
    trained = trainer.model.get_base_model()
    adapted = [name for name, module in trained.named_modules() if isinstance(module, BaseTunerLayer)]
    requires_grad = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert parts_of(requires_grad) == expected and parts_of(adapted) <= expected
    if "vision_tower" not in str(lora):
        for name, tensor in statistics_of(before).items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
    logits = logits_of(trainer.model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = VWLmmForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save", "target_parameters"])
def test_what_lies_outside_of_the_llm_alone_has_to_be_named(tmp_path, field):
    name = "linear_1.weight" if field == "target_parameters" else "linear_1"
    problem = f"found '{name}' in {field}, .* name the part, as in 'model.multi_modal_projector.{name}'"
    with pytest.raises(ValueError, match=problem):
        train(tmp_path, lora={field: ["q_proj", name]})


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "convolution"]}, {"bias": "all"}], ids=str)
def test_statistics_of_a_tower_that_somebody_has_adapted_stay(tmp_path, lora):
    """A PEFT model has been told what trains: adapters or biases of its tower, but no statistics."""
    base = base_folder(tmp_path, tower="resnet")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = statistics_of(model)
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **lora}))
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path / "adapter", learning_rate=0.1),
        train_dataset=conversations(),
        processing_class=tiny_processor(model.config),
    )
    trainer.train()
    trainer.save_model()
    after = model.get_base_model().state_dict()
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_statistics_of_a_tower_that_trains_move_and_are_saved(tmp_path):
    base = base_folder(tmp_path, tower="resnet")
    arguments = {"trainable": ["vision_tower", "projector"], "learning_rate": 0.1}
    before = statistics_of(AutoModelForCausalLM.from_pretrained(base))
    for save_only_trained in (False, True):
        folder = tmp_path / str(save_only_trained)
        args = sft_config(folder, save_only_trained=save_only_trained, **arguments)
        trainer = VWLmmSFTTrainer(str(base), args, train_dataset=conversations())
        trainer.train()
        trainer.save_model()
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(loaded), logits_of(trainer.model))
        after = statistics_of(trainer.model)
        assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items() if name in after)
