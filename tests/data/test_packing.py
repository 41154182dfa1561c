"""Which samples share a row, and how long samples are."""

import datasets
import numpy as np
import pytest

from helpers.conversations import PLAIN_TEMPLATE, conversations, picture, tiny_processor
from helpers.tiny import tiny_config
from modeling_vwlmm.data import lengths
from modeling_vwlmm.data.collator import VWLmmDataCollator
from modeling_vwlmm.data.lengths import token_counts
from modeling_vwlmm.data.packing import PackedRows, best_fit
from modeling_vwlmm.processing import read_chat_template


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def collator_with(template=PLAIN_TEMPLATE, **kwargs):
    return VWLmmDataCollator(processor=tiny_processor(tiny_config(), template), **kwargs)


def drawn_lengths(count, seed=0):
    """As LLaVA-1.5's mix: an image in nine of ten samples."""
    generator = np.random.default_rng(seed)
    text = np.clip(np.exp(generator.normal(5.4, 1.0, count)), 30, 1500)
    return text.astype(int) + 576 * (generator.random(count) < 0.9)


def naive_best_fit(lengths, max_length):
    """The number of tokens of each row: the longest first, each where it leaves the least space."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if row[0] + length <= max_length]
        row = max(fitting, default=None)
        if row is None:
            rows.append(row := [0])
        row[0] += length
    return sorted(row[0] for row in rows)


def test_rows_are_those_of_best_fit():
    lengths = drawn_lengths(500)
    rows = best_fit(lengths, 2100, seed=0)
    assert sorted(sample for row in rows for sample in row) == list(range(500))
    found = [lengths[row].sum() for row in rows]
    assert max(found) <= 2100 and sorted(found) == naive_best_fit(lengths, 2100)


def test_rows_are_full_and_follow_the_seed():
    lengths = drawn_lengths(20_000)
    rows = best_fit(lengths, 4096, seed=0)
    assert 1 - lengths.sum() / (4096 * len(rows)) < 0.03
    assert rows == best_fit(lengths, 4096, seed=0) != best_fit(lengths, 4096, seed=1)


def test_samples_that_fill_a_row_or_more_have_it_alone():
    assert best_fit(np.array([8, 3, 12, 5]), 8, seed=0) in ([[0], [2], [3, 1]], [[2], [0], [3, 1]])


def test_a_packed_row_is_its_samples():
    rows = PackedRows(conversations(), [[2, 0], [1], [3]])
    assert len(rows) == 3 and [len(sample["images"]) for sample in rows[0]] == [2, 1]


def prompts(row, i):
    asked, answered = row["messages"][:2]
    return {"images": row["images"], "prompt": [asked], "completion": [answered]}


FORMATS = {
    "messages": lambda: conversations(),
    "text": lambda: conversations().map(
        lambda row: {"text": "<image> w9 " * len(row["images"]) + "w5 w6"}, remove_columns="messages"
    ),
    "prompts": lambda: conversations().map(prompts, with_indices=True, remove_columns="messages"),
    "texts of prompts": lambda: conversations((1, 1, 1, 0)).map(
        lambda row: {"prompt": "w3 " + "<image>" * len(row["images"]), "completion": " w5 w6"},
        remove_columns="messages",
    ),
    "one image": lambda: datasets.Dataset.from_list(
        [{"image": picture(i) if i else None, "messages": row["messages"]} for i, row in enumerate(conversations())]
    ),
    "no images": lambda: conversations((0, 0, 0, 0)),
    "shuffled": lambda: conversations().shuffle(seed=1),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_lengths_are_those_of_the_rows(kind):
    dataset, collator = FORMATS[kind](), collator_with(needs_labels=False)
    collator.assistant_turns_only = "messages" in dataset.column_names
    expected = [int(collator([row])["attention_mask"].sum()) for row in dataset]
    assert len(set(expected)) > 1 or kind == "no images"
    assert token_counts(dataset, collator).tolist() == expected


def test_a_token_that_the_tokenizer_adds_is_counted():
    dataset, collator = conversations(), collator_with(read_chat_template("vicuna_v1").replace("</s>", " </s> "))
    expected = [int(collator([row])["attention_mask"].sum()) for row in dataset]
    assert token_counts(dataset, collator).tolist() == expected


def test_lengths_are_counted_once(monkeypatch, cache):
    dataset, collator = conversations(), collator_with()
    expected = token_counts(dataset, collator)
    collator([dict(row) for row in dataset])  # leaves its padding in the tokenizer
    counted = []
    count = VWLmmDataCollator.token_count
    monkeypatch.setattr(VWLmmDataCollator, "token_count", lambda self, row: counted.append(row) or count(self, row))
    assert np.array_equal(token_counts(conversations(), collator), expected) and not counted
    assert len(list(cache.rglob("*.arrow"))) == 1
    # Another text, other images, another template
    edited = conversations().map(lambda row, i: {"messages": row["messages"] * (1 + (i == 3))}, with_indices=True)
    assert np.sign(token_counts(edited, collator) - expected).tolist() == [0, 0, 0, 1]
    assert (token_counts(conversations((2, 0, 2, 1)), collator) - expected).tolist() == [4, 0, 0, 0]
    other = collator_with(PLAIN_TEMPLATE.replace("w97 {{ message", "w97 w96 {{ message"))
    assert (token_counts(conversations(), other) - expected).tolist() == [1, 2, 1, 2]
    assert len(counted) == 12
    monkeypatch.setattr(lengths, "hash_of", lambda path: "of other code")
    assert np.array_equal(token_counts(conversations(), collator), expected) and len(counted) == 16


@pytest.mark.parametrize("kept", [0, 10, -5])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_lengths_that_are_damaged_are_counted_again(cache, kept, num_proc):
    dataset, collator = conversations(), collator_with()
    expected = token_counts(dataset, collator, num_proc)
    for path in cache.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:kept])
    for _ in range(2):
        assert np.array_equal(token_counts(dataset, collator, num_proc), expected)


def test_a_sample_that_lacks_an_image_is_named():
    dataset = conversations().map(lambda row: {"messages": [{"role": "user", "content": "w5 <image>"}]})
    with pytest.raises(ValueError, match="a sample: the text of a message holds <image>"):
        token_counts(dataset, collator_with())


def test_images_are_not_opened(tmp_path):
    rows = [{"images": [{"bytes": b"no image", "path": None}], "messages": conversations()[0]["messages"]}]
    features = datasets.Features({**conversations().features, "images": datasets.List(datasets.Image(decode=False))})
    dataset = datasets.Dataset.from_list(rows, features=features)
    expected = token_counts(conversations().select([0]), collator_with())
    assert np.array_equal(token_counts(dataset, collator_with()), expected)


def test_a_transform_is_refused():
    with pytest.raises(ValueError, match="has a transform"):
        token_counts(conversations().with_transform(lambda rows: rows), collator_with())
