"""Streams train as data sets do: they go on from a checkpoint to the same weights, and end after `max_steps`."""

import datasets
import pytest
import torch

from helpers.conversations import conversations
from helpers.tiny import tiny_model
from helpers.training import trainer_of


STREAMS = {
    # Four samples for five steps of three: a step takes the end of a pass and the beginning of the next
    "plain": lambda: conversations().to_iterable_dataset(),
    "shuffled": lambda: conversations().to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=3),
    "mixed": lambda: datasets.interleave_datasets(
        [conversations().to_iterable_dataset(), conversations((0, 1, 1, 0)).to_iterable_dataset()],
        probabilities=[0.7, 0.3],
        seed=1,
        stopping_strategy="all_exhausted",
    ),
}


@pytest.mark.parametrize("kind, workers", [("plain", 0), ("shuffled", 2), ("mixed", 0)])
def test_a_stream_goes_on_to_the_same_weights(tmp_path, kind, workers):
    arguments = {
        "max_steps": 5,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2 if kind == "mixed" else 1,
        "dataloader_num_workers": workers,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trainer_of(tmp_path / "run", tiny_model(), STREAMS[kind](), **arguments)
    whole.train()
    resumed = trainer_of(tmp_path / "run", tiny_model(), STREAMS[kind](), **arguments)
    collate = resumed.data_collator.torch_call
    made = []
    resumed.data_collator.torch_call = lambda examples: made.append(1) or collate(examples)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    if workers == 0:  # of batches before the checkpoint, none; one more is made while the last one trains
        assert len(made) == 2 * arguments["gradient_accumulation_steps"] + 1
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert len(losses[0]) == 5 and losses[0] == losses[1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
