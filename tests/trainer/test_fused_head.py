"""Both losses from one run of the backbone, without full-length logits."""

import pytest
import torch
import trl
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from helpers.tiny import tiny_batch, tiny_model
from helpers.training import assert_same, batch_of, first_gradients, trainer_of
from modeling_vwlmm import modeling_vwlmm
from modeling_vwlmm.trainer.fused_head import add_visual_word_loss
from modeling_vwlmm.visual_word_loss import visual_word_loss


def test_gradients_are_those_of_the_models_own_loss(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, max_grad_norm=0)
    batch = batch_of(trainer)
    model.train()
    outputs = model(**{name: tensor.clone() for name, tensor in batch.items()})
    outputs.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert_same(first_gradients(trainer), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_four_accumulated_steps_of_one_are_a_batch_of_four(tmp_path, target):
    def run(batch_size, steps):
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            visual_word_target=target,
            max_grad_norm=0,
        )
        gradients = first_gradients(trainer)
        return gradients, trainer

    accumulated, first = run(1, 4)
    whole, second = run(4, 1)
    assert_same(accumulated, whole, atol=1e-6, rtol=1e-4)
    logs = [trainer.state.log_history[0] for trainer in (first, second)]
    for name in ("loss", "lm_loss", "vw_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5) and logs[0][name] > 0
    assert logs[0]["loss"] == pytest.approx(logs[0]["lm_loss"] + logs[0]["vw_loss"], rel=1e-5)


def test_full_length_logits_are_not_built(tmp_path, monkeypatch):
    """TRL's head gets the positions before a label, ours the scored image positions."""
    model, rows = tiny_model(), []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction, "apply", lambda *args: rows.append(len(args[0])) or apply(*args)
    )
    monkeypatch.setattr(
        modeling_vwlmm, "visual_word_loss", lambda *args, **kwargs: rows.append(len(args[0])) or loss(*args, **kwargs)
    )
    loss = visual_word_loss
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head was called"))
    trainer = trainer_of(tmp_path, model, max_steps=1)
    labels = (batch_of(trainer)["labels"][:, 1:] >= 0).sum()
    trainer.train()
    assert rows == [labels, 4 * model.config.image_seq_length]  # of the batch's four images


def test_a_frozen_tower_builds_no_graph(tmp_path):
    """Not even under activation checkpointing, for which TRL has all embeddings ask for gradients."""
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, stage="joint", activation_checkpointing=True)
    graphs = []
    model.model.vision_tower.register_forward_hook(
        lambda module, inputs, outputs: graphs.append(outputs.last_hidden_state.requires_grad)
    )
    first_gradients(trainer)
    assert graphs == [False]


def test_vm_head_training_runs_the_lmm_without_a_graph(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, stage="visual_words")
    needed_graph = []
    model.model.register_forward_hook(
        lambda module, inputs, outputs: needed_graph.append(outputs.last_hidden_state.requires_grad)
    )
    assert first_gradients(trainer).keys() == {"model.vm_head.weight"}
    assert needed_graph == [False]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_text_loss_takes_the_head_of_labelled_positions_alone(monkeypatch, weight):
    """Also where the visual-word loss is off, as in stages 1 and 2: TRL scores every position on a CPU."""
    model, rows = tiny_model(visual_word_loss_weight=weight), []
    add_fused_lm_head(model, outputs=("log_probs",))
    add_visual_word_loss(model)
    apply = trl_utils._ChunkedLogProbFunction.apply

    def counting_apply(hidden_states, *args):
        rows.append(len(hidden_states))
        return apply(hidden_states, *args)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", counting_apply)
    batch = tiny_batch(model.config)
    found = model(**batch, fused_lm_head=True)
    assert rows == [(batch["labels"][:, 1:] != -100).sum()]
    torch.testing.assert_close(-found.log_probs[found.label_mask].mean(), model(**batch).lm_loss)
