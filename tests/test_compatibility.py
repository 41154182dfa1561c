"""What differs between releases of transformers. `make matrix` runs the releases themselves."""

import importlib.util
import re
import sys
import types
from importlib import metadata

import pytest
import torch
import transformers

from helpers.source import PACKAGE
from helpers.tiny import tiny_batch, tiny_model, without_labels
from modeling_vwlmm.compatibility import kept_positions
from modeling_vwlmm.requirements import named


def imported_again():
    spec = importlib.util.spec_from_file_location("compatibility_again", PACKAGE / "compatibility.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_release_that_is_too_old(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.15.1")
    with pytest.raises(ImportError, match=r"^VW-LMM works with transformers 5\.16 to [\d.]+, found 5\.15\.1: .*-U"):
        imported_again()


def test_a_release_that_lacks_a_name(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    monkeypatch.setitem(
        sys.modules, "transformers.modeling_outputs", types.ModuleType("transformers.modeling_outputs")
    )
    with pytest.raises(ImportError, match=r"^VW-LMM works with .*, found 6\.1\.0: .*'BaseModelOutputWithPast'"):
        imported_again()


def test_the_cache_has_two_names():
    model = tiny_model()
    batch = without_labels(tiny_batch(model.config, padding="left"))
    out = model(**batch, use_cache=True)
    assert out.past_key_values is out.cache
    assert model.model(**batch, use_cache=True).cache.get_seq_length() == batch["input_ids"].shape[1]
    tokens = out.logits[:, -1:].argmax(-1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    whole = model(**{**batch, "input_ids": torch.cat([batch["input_ids"], tokens], 1), "attention_mask": mask})
    for name in ("past_key_values", "cache"):
        cache = model(**batch, use_cache=True).cache
        step = model(input_ids=tokens, attention_mask=mask, **{name: cache})
        torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wanted,expected",
    [
        (0, [[0, 1, 2], [3, 4, 5]]),
        (2, [[1, 2], [4, 5]]),
        (torch.tensor([0, 2]), [[0, 2], [3, 5]]),
        (torch.tensor([[0, 2], [1, 1]]), [[0, 2], [4, 4]]),
        (torch.tensor([[True, False, True], [False, True, False]]), [0, 2, 4]),
    ],
    ids=["all", "last", "positions", "positions of each row", "mask"],
)
def test_positions_that_are_kept(wanted, expected):
    hidden_states = torch.arange(6).view(2, 3, 1)
    assert kept_positions(hidden_states, wanted).squeeze(-1).tolist() == expected


def test_an_upgrade_of_trl_that_removes_a_name(monkeypatch):
    """Said by the trainer, in one line: what is gone, and the releases that have it."""
    versions = {"trl": "7.0.0", "peft": "0.1.0"}
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or version(name))
    error = named(ImportError("cannot import name 'SFTTrainer' from 'trl'"))
    assert re.fullmatch(
        r"cannot import name 'SFTTrainer' from 'trl': modeling_vwlmm works with trl[<>=.,\d]+, found 7\.0\.0; "
        r"peft[<>=.,\d]+, found 0\.1\.0",
        str(error),
    )
