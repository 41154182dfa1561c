"""The losses of an evaluation."""

import pytest
import torch

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import batch_of, sft_config
from modeling_vwlmm.trainer import VWLmmSFTTrainer


def trainer_with(tmp_path, eval_dataset, **kwargs):
    model = tiny_model(visual_word_loss_weight=0.5)
    return VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, per_device_eval_batch_size=1, **kwargs),
        train_dataset=conversations(),
        eval_dataset=eval_dataset,
        processing_class=tiny_processor(model.config),
    )


def test_each_data_set_has_losses_of_its_own_name(tmp_path):
    sets = {"a": conversations(), "b": conversations().select([0])}
    metrics = trainer_with(tmp_path, sets).evaluate()
    assert metrics["eval_a_lm_loss"] != metrics["eval_b_lm_loss"]
    for name, dataset in sets.items():
        alone = trainer_with(tmp_path, dataset).evaluate(metric_key_prefix="test")
        for loss in ("loss", "lm_loss", "vw_loss"):
            assert metrics[f"eval_{name}_{loss}"] == pytest.approx(alone[f"test_{loss}"], rel=1e-6)
    assert "eval_lm_loss" not in metrics


def test_the_loss_is_the_sum_of_the_two_whatever_the_batches(tmp_path):
    trainer = trainer_with(tmp_path, conversations())  # rows of unequal length, one at a time
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + 0.5 * metrics["eval_vw_loss"], rel=1e-6)
    with torch.no_grad():
        outputs = trainer.model.eval()(**batch_of(trainer))  # all rows at once
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_a_prediction_adds_nothing_to_the_next_evaluation(tmp_path):
    trainer = trainer_with(tmp_path, conversations())
    before = trainer.evaluate()
    trainer.predict(conversations().select([0, 2]))
    after = trainer.evaluate()
    for name in ("eval_lm_loss", "eval_vw_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert after[name] == before[name]


def test_rows_without_answers_are_predicted_and_not_evaluated(tmp_path):
    questions = conversations().map(lambda row: {"messages": row["messages"][:1]})
    trainer = trainer_with(tmp_path, conversations())
    output = trainer.predict(questions)
    assert output.predictions.shape[0] == 4 and (output.label_ids == -100).all()
    assert output.metrics["test_vw_loss"] > 0 and "test_lm_loss" not in output.metrics
    with pytest.raises(ValueError, match="no token of the batch is a label.*: sample 0"):
        trainer.evaluate(questions)


def test_where_only_the_vm_head_trains_the_text_is_no_part_of_the_loss(tmp_path):
    trainer = trainer_with(tmp_path, conversations(), stage="visual_words")
    trainer.train()
    metrics = trainer.evaluate()
    for log in trainer.state.log_history[:3]:
        assert log["loss"] == pytest.approx(log["vw_loss"], rel=1e-6) and log["lm_loss"] > 0
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_vw_loss"], rel=1e-6) and metrics["eval_lm_loss"] > 0


def test_a_try_with_a_batch_that_was_too_large_leaves_nothing_in_the_log(tmp_path):
    found = []
    for fails in (False, True):
        trainer = trainer_with(tmp_path, None, auto_find_batch_size=True, max_steps=1, gradient_accumulation_steps=2)
        step = trainer.training_step

        def training_step(*args, _step=step, _trainer=trainer, _fails=fails, **kwargs):
            loss = _step(*args, **kwargs)
            if _fails and _trainer._train_batch_size == 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

        trainer.training_step = training_step
        if not fails:
            trainer._train_batch_size = 3
        trainer.train()
        names = ("lm_loss", "vw_loss", "loss", "num_tokens")
        found.append({name: trainer.state.log_history[0][name] for name in names})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
