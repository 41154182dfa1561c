"""Packed training, and batches of samples that are about equally long."""

import functools

import datasets
import peft
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from transformers import Trainer, TrainerCallback

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import assert_same, batch_of, first_gradients, sft_config, trainer_of
from modeling_vwlmm.data.collator import VWLmmDataCollator
from modeling_vwlmm.trainer import VWLmmSFTTrainer, batches
from modeling_vwlmm.trainer.summary import summary_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def many():
    """16 samples of 7 to 20 tokens."""
    images = [(1, 0, 2, 1), (0, 1, 1, 0), (2, 0, 0, 1), (0, 0, 1, 1)]
    return datasets.concatenate_datasets([conversations(counts) for counts in images])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["whole", "accumulated"])
def test_a_step_is_that_of_its_samples_padded(tmp_path, settings):
    packed = trainer_of(tmp_path, dataset=many(), packing=True, max_length=40, max_grad_norm=0, max_steps=-1)
    rows = len(packed.packed_rows)
    steps = settings.get("gradient_accumulation_steps", 1)
    batch_size = -(-rows // steps)
    found = trainer_of(
        tmp_path, dataset=many(), packing=True, max_length=40, max_grad_norm=0, **settings,
        per_device_train_batch_size=batch_size,
    )  # fmt: skip
    expected = trainer_of(tmp_path, dataset=many(), max_grad_norm=0, per_device_train_batch_size=16)
    assert_same(first_gradients(found), first_gradients(expected), atol=1e-5, rtol=1e-5)
    logs = [trainer.state.log_history[0] for trainer in (found, expected)]
    for name in ("loss", "lm_loss", "vw_loss", "num_tokens"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    assert rows < 16 and found.args.packing


def test_rows_hold_max_length_and_each_sample_once(tmp_path):
    trainer = trainer_of(tmp_path, dataset=many(), packing=True, max_length=40, per_device_train_batch_size=1)
    lengths, tokens = [], 0
    for batch in trainer.get_train_dataloader():
        lengths.append(batch["input_ids"].shape[1])
        tokens += batch["cu_seq_lens_q"].numel() - 1
    assert max(lengths) <= 40 and tokens == 16 and sum(lengths) == trainer.token_counts.sum()
    assert len(trainer.train_dataset) == 16  # what the checkpoint's record of the data is about


def test_rows_follow_the_seed(tmp_path):
    rows = [
        trainer_of(tmp_path, dataset=many(), packing=True, max_length=40, seed=seed).packed_rows for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(
    "settings", [{"packing": True, "max_length": 30}, {"train_sampling_strategy": "group_by_length"}]
)
def test_training_goes_on_exactly(tmp_path, settings):
    """From the middle of the second epoch, where the order is another one."""
    settings = {**settings, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    epoch = len(trainer_of(tmp_path, dataset=many(), **settings).get_train_dataloader())
    settings["max_steps"] = epoch + 3
    whole, resumed = tiny_model(), tiny_model()
    trainer_of(tmp_path, whole, many(), **settings).train()
    again = trainer_of(tmp_path, resumed, many(), **settings)
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    again.add_callback(Record())
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{epoch + 1}"))
    assert seen == [epoch + 2, epoch + 3]
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("processes", [1, 2])
def test_groups_follow_the_epoch_where_a_run_goes_on(tmp_path, monkeypatch, processes):
    orders = []

    def run_epoch(self, epoch, train_dataloader, steps_trained_in_current_epoch):
        loader = skip_first_batches(train_dataloader, steps_trained_in_current_epoch)
        loader.set_epoch(epoch)
        orders.append(list(loader.batch_sampler))

    monkeypatch.setattr(Trainer, "_run_epoch", run_epoch)
    trainer = trainer_of(tmp_path, dataset=many(), train_sampling_strategy="group_by_length")
    trainer.state.max_steps = 1
    for epoch, skipped in ((0, 0), (1, 0), (1, 1)):
        loader = torch.utils.data.DataLoader(many(), 2, sampler=trainer._get_train_sampler())
        loader = prepare_data_loader(loader, num_processes=processes, process_index=0)
        trainer._run_epoch(epoch=epoch, train_dataloader=loader, steps_trained_in_current_epoch=skipped)
    assert orders[0] != orders[1] and orders[1][1:] == orders[2]


def test_samples_of_a_batch_are_about_equally_long(tmp_path):
    def padding(**settings):
        trainer = trainer_of(tmp_path, dataset=many(), per_device_train_batch_size=2, **settings)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(mask.shape[0] for mask in masks) == 16
        return sum((mask == 0).sum() for mask in masks)

    assert padding(train_sampling_strategy="group_by_length") < 0.7 * padding()


def test_lengths_that_the_data_bring_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(VWLmmDataCollator, "token_count", lambda *args: pytest.fail("counted"))
    dataset = many().add_column("length", [10, 20] * 8)
    trainer = trainer_of(tmp_path, dataset=dataset, train_sampling_strategy="group_by_length")
    assert trainer.get_train_dataloader().batch_sampler.sampler.lengths == [10, 20] * 8


@pytest.mark.parametrize("length", [None, "10", float("nan")])
def test_lengths_that_are_no_numbers_are_refused(tmp_path, length):
    dataset = many().add_column("length", [length] * 16)
    trainer = trainer_of(tmp_path, dataset=dataset, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="^column length: found .*, expected the tokens of each sample"):
        trainer.get_train_dataloader()


def test_evaluation_keeps_the_order(tmp_path):
    trainer = trainer_of(tmp_path, dataset=many(), train_sampling_strategy="group_by_length")
    rows = [batch["input_ids"] for batch in trainer.get_eval_dataloader(many())]
    expected = trainer_of(tmp_path).get_eval_dataloader(many())
    assert all(torch.equal(found, batch["input_ids"]) for found, batch in zip(rows, expected, strict=True))


def test_long_samples_lose_text_as_they_do_without_packing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(batches.logger, "warning", said.append)
    trainer = trainer_of(tmp_path, packing=True, max_length=12)
    assert trainer.token_counts.max() == 12 and batch_of(trainer)["max_length_q"] == 12
    assert said == [
        "2 of 4 samples have more than max_length 12 tokens, and lose text at their end: the longest is sample 3 with "
        "19"
    ]


def test_the_summary_tells_how_full_rows_are(tmp_path):
    trainer = trainer_of(tmp_path, dataset=many(), packing=True, max_length=40, per_device_train_batch_size=2)
    rows, tokens = len(trainer.packed_rows), trainer.token_counts.sum()
    expected = f"16 samples in {rows} rows of 40 tokens, {1 - tokens / rows / 40:.1%} left over, 2 rows a step"
    assert summary_of(trainer).endswith(expected)


def test_a_row_is_too_few_for_two_devices(tmp_path):
    trainer = trainer_of(tmp_path, packing=True, max_length=100, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="the data have 1 rows, expected at least 4"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"packing": True, "max_length": None}, {}, "max_length is null: give a number"),
        ({"packing": True, "packing_strategy": "wrapped"}, {}, '"wrapped", which cuts samples: expected "bfd"'),
        ({"packing": True, "eval_packing": True}, {}, "eval_packing is for texts"),
        ({"packing": True, "train_sampling_strategy": "group_by_length"}, {}, "rows are about equally long"),
        ({"packing": True}, {"train_dataset": conversations().to_iterable_dataset()}, "use padding_free"),
        (
            {"train_sampling_strategy": "group_by_length", "max_steps": 1},
            {"train_dataset": conversations().to_iterable_dataset()},
            "group_by_length, which chooses among all samples",
        ),
        ({"padding_free": True}, {"data_collator": VWLmmDataCollator}, "padding_free makes its own batches"),
        (
            {"padding_free": True},
            {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
            "PROMPT_TUNING puts tokens before a row",
        ),
        (
            {},
            {
                "data_collator": functools.partial(VWLmmDataCollator, padding_free=True),
                "peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            },
            "PROMPT_TUNING puts tokens before a row",
        ),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_what_cannot_be_is_refused(tmp_path, settings, arguments, message):
    model = tiny_model()
    processor = tiny_processor(model.config)
    if "data_collator" in arguments:
        arguments = {**arguments, "data_collator": arguments["data_collator"](processor=processor)}
    with pytest.raises(ValueError, match=message):
        VWLmmSFTTrainer(
            model,
            sft_config(tmp_path, **settings),
            **{"train_dataset": conversations(), "processing_class": processor, **arguments},
        )
