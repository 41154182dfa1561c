"""The trainer: TRL's with the visual-word loss, in the four stages."""

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.conversations import conversations, picture, tiny_processor
from helpers.tiny import IMAGE_WITHIN, tiny_model
from helpers.training import batch_of, first_gradients, sft_config, trainer_of
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.data.collator import VWLmmDataCollator
from modeling_vwlmm.stages import PARTS, STAGES
from modeling_vwlmm.trainer import VWLmmSFTTrainer


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "read"])  # see test_read.py
def test_stage_trains_its_parts_and_no_others(tmp_path, stage):
    model = tiny_model(tower="resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer_of(tmp_path, model, stage=stage).train()
    trained = tuple(name for part in STAGES[stage]["trainable"] for name in PARTS[part])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(trained), name


def test_the_weight_of_the_visual_word_loss_changes_the_gradients(tmp_path):
    gradients = {
        weight: first_gradients(trainer_of(tmp_path, visual_word_loss_weight=weight, max_grad_norm=0))
        for weight in (0.0, 1.0, 2.0)
    }
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    added = gradients[1.0][name] - gradients[0.0][name]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(gradients[2.0][name] - gradients[0.0][name], 2 * added, atol=1e-6, rtol=1e-4)
    assert "model.vm_head.weight" in gradients[1.0] and "model.vm_head.weight" not in gradients[0.0]


def test_weight_0_is_trls_own_llava_training_step_by_step(tmp_path):
    model = tiny_model(image_token_index=IMAGE_WITHIN, visual_word_loss_weight=0.0)
    config = model.config
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=IMAGE_WITHIN,
            image_seq_length=config.image_seq_length,
        )
    )
    stock.load_state_dict({k: v.clone() for k, v in model.state_dict().items() if "vm_head" not in k})
    rows = [
        {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:2]}
        for row in conversations(images=(1, 1, 2, 1))
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    arguments = {"per_device_train_batch_size": 2, "max_steps": 6, "seed": 3, "trainable": None}
    ours = VWLmmSFTTrainer(
        model, sft_config(tmp_path, **arguments), train_dataset=dataset, processing_class=tiny_processor(config)
    )
    arguments.pop("trainable")
    trls = SFTTrainer(
        stock,
        sft_config(tmp_path, SFTConfig, **arguments),
        train_dataset=dataset,
        processing_class=tiny_processor(config),
    )
    ours.train()
    trls.train()
    # The head reads labelled positions alone here: sums in another order, which float32 rounds to 1e-7
    for our_log, their_log in zip(ours.state.log_history[:-1], trls.state.log_history[:-1], strict=True):
        assert {name: value for name, value in our_log.items() if name in their_log} == pytest.approx(
            their_log, rel=1e-5
        )
        assert our_log["lm_loss"] == pytest.approx(our_log["loss"]) and our_log["vw_loss"] == 0
    theirs = stock.state_dict()
    for name, tensor in model.state_dict().items():
        if name in theirs:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


def test_log_lines_and_evaluation_have_both_losses(tmp_path):
    model = tiny_model(visual_word_loss_weight=0.5)
    trainer = VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
        train_dataset=conversations(),
        eval_dataset=conversations(),
        processing_class=tiny_processor(model.config),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == len(evaluations) == 3
    for log in logs:
        assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["vw_loss"], rel=1e-4)
    for log in evaluations:
        assert log["eval_loss"] == pytest.approx(log["eval_lm_loss"] + 0.5 * log["eval_vw_loss"], rel=1e-4)
    with torch.no_grad():
        outputs = model.eval()(**batch_of(trainer))
    assert evaluations[-1]["eval_vw_loss"] == pytest.approx(outputs.vw_loss.item(), rel=1e-4)
    assert evaluations[-1]["eval_lm_loss"] == pytest.approx(outputs.lm_loss.item(), rel=1e-4)


def test_checkpoints_load_with_their_processor(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = VWLmmForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2")
    batch = {"images": picture(0), "text": "w5 <image> w6", "return_tensors": "pt"}
    for name, tensor in tiny_processor(model.config)(**batch).items():
        assert torch.equal(processor(**batch)[name], tensor)


def test_a_model_may_be_given_by_name(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    trainer = VWLmmSFTTrainer(str(tmp_path / "model"), sft_config(tmp_path / "run"), train_dataset=conversations())
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0


def test_a_stream_trains(tmp_path):
    trainer = trainer_of(tmp_path, dataset=conversations().to_iterable_dataset())
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0


def test_an_empty_dataset_is_an_error(tmp_path):
    empty_stream = datasets.IterableDataset.from_generator(lambda: iter(()))
    for dataset in (conversations().select([]), empty_stream):
        with pytest.raises(ValueError, match="the dataset is empty"):
            trainer_of(tmp_path, dataset=dataset)


def test_evaluation_does_not_depend_on_the_batches(tmp_path):
    model = tiny_model()
    found = []
    for batch_size in (1, 2, 4):
        trainer = trainer_of(tmp_path, model, per_device_eval_batch_size=batch_size)
        metrics = trainer.evaluate(conversations(images=(2, 0, 0, 0)))
        found.append([metrics["eval_lm_loss"], metrics["eval_vw_loss"]])
    assert found[0] == pytest.approx(found[1]) and found[1] == pytest.approx(found[2]) and found[0][1] > 0


def test_stages_work_with_adapters(tmp_path):
    model = tiny_model()
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, stage="joint"),
        train_dataset=conversations(),
        processing_class=tiny_processor(model.config),
        peft_config=LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["vm_head"]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "vm_head.modules_to_save" in name for name in trained)


def test_training_resumes(tmp_path):
    whole = tiny_model()
    trainer_of(tmp_path / "whole", whole, max_steps=4, per_device_train_batch_size=1).train()
    first = tiny_model()
    arguments = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    interrupted = trainer_of(tmp_path / "part", first, **arguments)
    interrupted.add_callback(Stop())
    interrupted.train()
    resumed = tiny_model()
    trainer_of(tmp_path / "part", resumed, **arguments).train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_placeholders_are_no_labels_with_another_collator_either(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model.config)
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, assistant_only_loss=False),
        data_collator=DataCollatorForVisionLanguageModeling(processor=processor),
        train_dataset=conversations(),
        processing_class=processor,
    )
    trainer.train()
    batch = batch_of(trainer)
    is_image = batch["input_ids"] == model.config.image_token_id
    assert is_image.any() and (batch["labels"][is_image] == -100).all()


def test_a_collator_of_ours_finds_what_the_assistant_says(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model.config)
    VWLmmSFTTrainer(
        model,
        sft_config(tmp_path),
        data_collator=VWLmmDataCollator(processor=processor),
        train_dataset=conversations(),
        processing_class=processor,
    ).train()


def test_a_vm_head_without_its_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only the VM head trains, and visual_word_loss_weight 0"):
        trainer_of(tmp_path, stage="visual_words", visual_word_loss_weight=0.0)
