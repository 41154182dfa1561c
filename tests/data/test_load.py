"""Data sets made ready for a trainer: nothing of them is copied, and their samples have numbers."""

import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from trl import SFTConfig, SFTTrainer

from helpers.conversations import IMAGES, conversations, picture, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import batch_of, sft_config, trainer_of
from modeling_vwlmm.data.load import number_samples
from modeling_vwlmm.trainer import VWLmmSFTTrainer


PICKED = {
    "whole": lambda dataset: dataset,
    "shuffled": lambda dataset: dataset.shuffle(seed=0),
    "twice": lambda dataset: dataset.select([2, 0, 2, 1]),
    "split": lambda dataset: dataset.train_test_split(0.5, seed=0)["train"],
}


@pytest.fixture
def on_disk(tmp_path):
    """A dataset of 480 kB of images, in a folder and mapped from there."""
    rows = [
        {"images": [picture(i, (200, 200))], **row} for i, row in enumerate(conversations().remove_columns("images"))
    ]
    datasets.Dataset.from_list(rows).cast_column("images", IMAGES).save_to_disk(tmp_path / "data")
    return datasets.load_from_disk(tmp_path / "data")


def files_below(*folders):
    return {path: path.stat().st_size for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("pick", PICKED)
@pytest.mark.parametrize("column", ["images", "image", "none"])
def test_a_trainer_copies_nothing_of_its_data(tmp_path, monkeypatch, on_disk, pick, column):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # datasets keeps what it computes of memory there
    if column == "image":
        images = datasets.Dataset.from_dict({"image": [row["images"][0] for row in on_disk]})
        images = images.cast_column("image", datasets.Image())
        datasets.concatenate_datasets([images, on_disk.remove_columns("images")], axis=1).save_to_disk(
            tmp_path / "one"
        )
        on_disk = datasets.load_from_disk(tmp_path / "one")
    elif column == "none":
        on_disk = on_disk.remove_columns("images")
    dataset = PICKED[pick](on_disk)
    before, allocated = files_below(tmp_path), pa.total_allocated_bytes()
    trainer = trainer_of(tmp_path / "out", dataset=dataset)
    assert files_below(tmp_path) == before
    assert pa.total_allocated_bytes() - allocated < 10_000
    batch_of(trainer)


@pytest.mark.parametrize("pick", PICKED)
def test_numbers_are_places_in_the_dataset_that_was_given(on_disk, pick):
    dataset = PICKED[pick](on_disk)
    numbered = number_samples(dataset)
    numbers = numbered[:]["sample_index"]
    assert numbers == ([0, 1, 0, 3] if pick == "twice" else list(range(len(dataset))))
    for row, number in zip(numbered, numbers, strict=True):
        assert row["messages"] == dataset[number]["messages"]


def test_images_that_messages_hold_stay_closed():
    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features({"messages": datasets.List({"content": datasets.List(part)})})
    messages = [{"content": [{"type": "image", "image": picture(0)}]}]
    dataset = datasets.Dataset.from_dict({"messages": [messages]}, features=features)
    (message,) = number_samples(dataset)[0]["messages"]
    assert message["content"][0]["image"]["bytes"]
    assert dataset[0]["messages"][0]["content"][0]["image"].size == (20, 16)  # the one that was given is as it was


def test_a_transform_makes_its_rows_of_open_images(tmp_path):
    def transform(batch):
        assert all(image.size == (20, 16) for images in batch["pictures"] for image in images)
        return {"images": batch["pictures"], "messages": batch["messages"]}

    dataset = conversations().rename_column("images", "pictures").with_transform(transform)
    arguments = {"remove_unused_columns": False}
    assert batch_of(trainer_of(tmp_path, dataset=dataset, **arguments))["pixel_values"].shape[0] == 4


NO_DATASETS = {
    "list": lambda: list(conversations()),
    "dict": lambda: datasets.DatasetDict(train=conversations()),
    "torch": lambda: __import__("torch").utils.data.TensorDataset(),
}


@pytest.mark.parametrize("kind", NO_DATASETS)
def test_what_trl_does_not_train_on_is_its_type_error(tmp_path, kind):
    """The same one as TRL's own."""
    model = tiny_model()
    messages = []
    for trainer, config in ((VWLmmSFTTrainer, {}), (SFTTrainer, {"kind": SFTConfig})):
        with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset` or `IterableDataset`") as error:
            trainer(
                model,
                sft_config(tmp_path, **config),
                train_dataset=NO_DATASETS[kind](),
                processing_class=tiny_processor(model.config),
            )
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_list_is_evaluated_as_in_trl(tmp_path):
    trainer = trainer_of(tmp_path)
    expected = trainer.evaluate(conversations())
    assert trainer.evaluate(list(conversations()))["eval_loss"] == pytest.approx(expected["eval_loss"])


def test_streams_go_to_workers_that_are_spawned(tmp_path):
    stream = conversations().to_iterable_dataset(num_shards=2)
    arguments = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    trainer = trainer_of(tmp_path, dataset=stream, **arguments)
    assert batch_of(trainer)["pixel_values"].shape[0] == 4


def test_samples_of_a_stream_are_numbered_by_the_worker_that_reads_them(tmp_path):
    rows = list(conversations((1, 1, 1, 1)))
    rows[2]["images"] = [b"no image"]
    stream = datasets.IterableDataset.from_generator(_some_of, gen_kwargs={"rows": rows})
    arguments = {"dataloader_num_workers": 2, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match=r"sample 1 of worker 0: image \(in memory\)"):
        list(trainer_of(tmp_path, dataset=stream, **arguments).get_train_dataloader())


def _some_of(rows):
    yield from rows
