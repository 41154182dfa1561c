"""Several data sets as one, whole and as a stream."""

import json
from collections import Counter

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List
from datasets.packaged_modules.parquet.parquet import Parquet

from helpers.conversations import picture
from helpers.messages import turns
from modeling_vwlmm.arguments import MixedDataset, MixtureArguments
from modeling_vwlmm.data.conversations import FEATURES
from modeling_vwlmm.data.mixture import load_mixture


ROWS = {"llava": 30, "parquet": 20, "saved": 10}
OPEN = Features({**FEATURES, "images": List(Image())})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same kind of rows in a data file, a folder of parquet and a saved data set."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "images").mkdir()
    records = []
    for i in range(ROWS["llava"]):
        picture(i).save(folder / "images" / f"{i}.png")
        records.append({"image": f"{i}.png", "conversations": turns("<image>", f"llava {i}")})
    (folder / "llava.json").write_text(json.dumps(records))
    (folder / "text.json").write_text(json.dumps([{"conversations": turns("Hello", f"text {i}")} for i in range(5)]))
    for name in ("parquet", "saved"):
        rows = Dataset.from_list(
            [{**row_of(f"{name} {i}"), "images": [picture(i)], "more": i} for i in range(ROWS[name])]
        )
        rows = rows.cast(Features({**OPEN, "more": rows.features["more"]}))
        (folder / name).mkdir()
        if name == "saved":
            rows.save_to_disk(folder / name)
        else:
            for i in range(2):
                rows.shard(2, i).to_parquet(folder / name / f"train-0000{i}-of-00002.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps for five seconds when a stream of parquet has ended."""
    monkeypatch.setattr(Parquet, "SLEEP_ON_THREADS_SHUTDOWNS", False, raising=False)


def row_of(answer):
    parts = [{"type": "image", "text": None}], [{"type": "text", "text": answer}]
    roles = ("user", "assistant")
    return {"id": "x", "messages": [{"role": r, "content": p} for r, p in zip(roles, parts, strict=True)]}


def entries_of(folder, **fractions):
    entries = []
    for name, fraction in fractions.items():
        path = f"{name}.json" if name in ("llava", "text") else name
        entries.append({"path": str(folder / path), "image_folder": str(folder / "images"), "fraction": fraction})
    return MixtureArguments(datasets=entries).datasets


def answers_of(rows):
    return [row["messages"][-1]["content"][0]["text"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_has_the_rows_of_all(folder, streaming):
    mixture = load_mixture(entries_of(folder, llava=None, parquet=None, saved=None, text=None), streaming)
    assert isinstance(mixture, IterableDataset if streaming else Dataset)
    rows = list(mixture)
    expected = [f"{name} {i}" for name, count in {**ROWS, "text": 5}.items() for i in range(count)]
    assert sorted(answers_of(rows)) == sorted(expected)
    for row in rows:
        name, _, index = answers_of([row])[0].partition(" ")
        assert row["sample_index"].startswith(f"{index} of {folder / name}")
        assert len(row["images"]) == (name != "text") and set(row) == {"id", "images", "messages", "sample_index"}
        assert all(image.keys() == {"bytes", "path"} for image in row["images"])
    if not streaming:
        assert answers_of(rows) == expected
    else:  # they take turns
        assert [answer.split()[0] for answer in answers_of(rows)[:5]] == ["llava", "parquet", "saved", "text", "llava"]


def test_fractions_of_whole_data_are_trls(folder):
    """As `get_dataset` documents them: the first rows of each, as many as there are without one twice."""
    counts = Counter(
        answer.split()[0] for answer in answers_of(load_mixture(entries_of(folder, llava=3, parquet=1, saved=1)))
    )
    assert counts == {"llava": 30, "parquet": 10, "saved": 10}


def test_fractions_of_a_stream_are_probabilities_until_all_is_read(folder):
    entries = entries_of(folder, llava=0.6, parquet=0.2, saved=0.2)
    answers = answers_of(load_mixture(entries, streaming=True, seed=3))
    assert len(set(answers)) == sum(ROWS.values())
    shares = {name: count / len(answers) for name, count in Counter(a.split()[0] for a in answers).items()}
    assert shares == pytest.approx({"llava": 0.6, "parquet": 0.2, "saved": 0.2}, abs=0.12)
    assert answers == answers_of(load_mixture(entries, streaming=True, seed=3))
    assert answers != answers_of(load_mixture(entries, streaming=True, seed=4))


def test_one_data_set_comes_as_it_is(folder):
    alone = load_mixture(entries_of(folder, saved=None))
    assert alone.column_names == ["id", "images", "messages", "more"] and len(alone) == 10
    stream = load_mixture(entries_of(folder, parquet=None), streaming=True)
    assert stream.n_shards == 2 and len(list(stream)) == 20


BAD = {
    "no fraction": (lambda e: setattr(e[1], "fraction", None), "parquet has no fraction, but .*llava.json has"),
    "zero": (lambda e: setattr(e[0], "fraction", 0), "llava.json has the fraction 0, expected more than 0"),
    "text": (lambda e: setattr(e[0], "fraction", "half"), "llava.json has the fraction 'half'"),
    "too large": (lambda e: setattr(e[0], "fraction", 10**400), "the fraction 1000.*, expected more than 0 and less"),
    "no name": (lambda e: setattr(e[0], "path", " "), "the name of the dataset is empty"),
    "no row": (lambda e: setattr(e[1], "fraction", 1e-4), "parquet has no row in a mixture of 30: its fraction is"),
    "missing": (lambda e: setattr(e[1], "path", "nobody/nothing"), "nobody/nothing"),
    "split": (lambda e: setattr(e[1], "split", "tset"), "parquet.*tset"),
    "column": (lambda e: setattr(e[1], "columns", ["message"]), "parquet has no column message, but id, "),
    "columns": (lambda e: setattr(e[1], "columns", ["images", "id"]), "parquet has the columns images, id: expected"),
    "options": (lambda e: setattr(e[0], "data_dir", "x"), "llava.json takes no data_dir"),
    "folder": (lambda e: setattr(e[0], "image_folder", None), "llava.json is a data file, so image_folder must"),
}


def test_one_column_may_be_a_text():
    assert MixedDataset("a", columns="messages").columns == ["messages"]
    assert MixedDataset("a", columns=["images", "messages", "images"]).columns == ["images", "messages"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(folder, case, streaming):
    if streaming and case == "no row":
        pytest.skip("a stream has as many as are drawn")
    change, message = BAD[case]
    entries = entries_of(folder, llava=0.5, parquet=0.5)
    change(entries)
    with pytest.raises((ValueError, OSError), match=message):
        load_mixture(entries, streaming)


CONTENTS = {
    "texts": lambda text, has_image: text,
    "parts of the Hub": lambda text, has_image: (
        [{"index": None, "text": text, "type": "text"}] + has_image * [{"index": 0, "text": None, "type": "image"}]
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_messages_of_one_type_are_made_of_several(folder, tmp_path, kind, streaming):
    content = CONTENTS[kind]
    rows = [
        {
            "messages": [
                {"content": content("What?", i > 0), "role": "user"},
                {"content": content(f"other {i}", False), "role": "assistant"},
            ],
            "images": [picture(i)] * (i > 0),
        }
        for i in range(3)
    ]
    Dataset.from_list(rows).cast_column("images", List(Image())).save_to_disk(tmp_path / "other")
    entries = [*entries_of(folder, llava=None), MixedDataset(path=str(tmp_path / "other"))]
    rows = list(load_mixture(entries, streaming))
    others = [row for row in rows if answers_of([row])[0].startswith("other")]
    assert len(rows) == 33 and [answers_of([row]) for row in others] == [[f"other {i}"] for i in range(3)]
    image, question = {"type": "image", "text": None}, {"type": "text", "text": "What?"}
    for i, row in enumerate(others):
        expected = [question] if i == 0 else [image, question] if kind == "texts" else [question, image]
        assert row["messages"][0] == {"role": "user", "content": expected}
        assert len(row["images"]) == (i > 0) and all(image["bytes"] for image in row["images"])


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_differ_are_named(folder, tmp_path, streaming):
    parts = [{"type": "image", "text": None, "url": "a.png"}]
    held = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    Dataset.from_list([{**held, "images": []}]).cast_column("images", List(Image())).save_to_disk(tmp_path / "types")
    Dataset.from_list([{**row_of("Hi"), "tools": "[]"}]).save_to_disk(tmp_path / "more")
    Dataset.from_list([row_of("Hi")]).select([]).save_to_disk(tmp_path / "none")
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(tmp_path / "prompt")
    for name, message in {
        "types": "the column messages is .* in .*types, and .* in .*llava.json: expected one type",
        "more": "more has the column tools, .*llava.json has not",
        "none": "dataset .*none cannot be read",
        "prompt": "prompt has the column completion, .*llava.json has not",
    }.items():
        entries = [*entries_of(folder, llava=None), MixedDataset(path=str(tmp_path / name), image_folder=".")]
        with pytest.raises(ValueError, match=message):
            load_mixture(entries, streaming)


def test_a_stream_names_files_below_its_folder_alone(folder, tmp_path):
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    rows = [{**row_of("Hi"), "images": [{"path": str(tmp_path / "secret.png"), "bytes": None}]}]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "data" / "train.parquet")
    entries = MixtureArguments(datasets=[str(tmp_path / "data")]).datasets
    message = "data: .*column images: found the image .*secret.png, which leads out of"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(load_mixture(entries, streaming))
    entries[0].image_folder = str(tmp_path)
    assert len(list(load_mixture(entries, streaming=True))) == 1


def test_images_stay_closed_until_they_are_read(tmp_path):
    """One that does not open is the collator's to name, or to skip."""
    rows = Dataset.from_list([{**row_of("a"), "images": [{"bytes": b"no image", "path": None}]}])
    rows.cast(Features({**rows.features, "images": OPEN["images"]})).save_to_disk(tmp_path / "saved")
    assert len(load_mixture([MixedDataset(path=str(tmp_path / "saved"))])) == 1
