"""The limits report of a tiny model."""

import json

import pytest
import torch

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.data.images import open_images
from modeling_vwlmm.evaluation.evaluate import evaluate
from modeling_vwlmm.evaluation.limits_page import QUESTIONS, markdown, results_of_limits, write_page
from modeling_vwlmm.evaluation.limits_report import Row, measure_images, names_of, of_other_images, report
from modeling_vwlmm.evaluation.questions import questions_of


@pytest.fixture(scope="module")
def pair():
    model = tiny_model()
    return model, tiny_processor(model.config)


@pytest.fixture(scope="module")
def questions():
    return questions_of(conversations((1, 0, 2, 1)))


def pictures(questions):
    return [open_images(question.row())[0] for question in questions if question.images]


@pytest.mark.parametrize("pseudo", [False, True])
def test_images_are_measured_as_the_model_computes_them(pair, questions, pseudo, monkeypatch):
    model, processor = pair
    # What such a model reads is f', but what is measured are the visual words of f, as of any other
    monkeypatch.setattr(model.config, "pseudo_image_features", pseudo)
    images = pictures(questions)
    found = measure_images(model, processor, iter(images), batch_size=2)
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        words = model.visual_words(pixel_values).double()
        tower = model.model.vision_tower(pixel_values, output_hidden_states=True)
        f = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:]).double()
    embeddings = model.get_input_embeddings().weight[: words.shape[-1]].detach().double()
    pseudo = words @ embeddings
    assert found.relative_error == pytest.approx(((pseudo - f).norm(dim=-1) / f.norm(dim=-1)).numpy(), rel=1e-4)
    assert found.cosine == pytest.approx(
        ((pseudo * f).sum(-1) / pseudo.norm(dim=-1) / f.norm(dim=-1)).numpy(), rel=1e-4
    )
    assert found.perplexity == pytest.approx((-(words * words.log()).sum(-1)).exp().numpy(), rel=1e-4)
    assert found.mean.numpy() == pytest.approx(words.mean((0, 1)).numpy(), rel=1e-4)
    assert (found.top[..., 0] == words.argmax(-1).numpy()).all() and found.mass.shape == (*words.shape[:2], 3)


def test_other_images_are_as_many_and_none_is_its_own(questions):
    single = [question for question in questions if len(question.images) == 1]
    others = of_other_images(single)
    assert all(other.image_key != question.image_key for other, question in zip(others, single, strict=True))
    assert [other.text for other in others] == [question.text for question in single]
    with pytest.raises(ValueError, match="all questions are about the same image"):
        of_other_images(single[:1])


def test_names_come_from_a_column_or_from_answers(questions):
    first = questions[0]
    assert names_of([first]) == {first.image_key: set()}  # "w5 w6" are no words
    first.columns["names"] = ["Owl", "bird"]
    assert names_of([first]) == {first.image_key: {"owl", "bird"}}
    del first.columns["names"]


def test_the_report_answers_every_question_on_both_splits(pair, questions, tmp_path):
    model, _ = pair
    arguments = {"max_new_tokens": 3, "answers_folder": tmp_path}
    rows = report(*pair, {"held out": questions, "training": questions[::-1]}, model, **arguments)
    assert not model.config.pseudo_image_features
    by_name = {row.name: row for row in rows}
    assert {row.topic for row in rows} == QUESTIONS.keys() - {"semantic gap", "left out"}  # its answers are no words
    assert all(set(row.values) == {"held out", "training"} for row in rows)
    assert (
        by_name["right answers, reading f"].values["held out"]
        == evaluate(*pair, questions, max_new_tokens=3).figures["exact_match"]["overall"]
    )
    assert by_name["perplexity of a visual word"].values["held out"].mean > 1
    most_used = by_name["the ten most used words"].values["held out"]
    assert len(most_used) == 10 and most_used[0][1] > most_used[9][1]
    mass = by_name["mass of the ten most used words"].values["held out"]
    assert sum(mass for _, mass in most_used) == pytest.approx(mass)
    page = write_page(rows, tmp_path, "tiny").read_text()
    assert page == markdown(rows, "tiny") and "| held out | training |" in page
    assert (tmp_path / "assets" / "limits.png").stat().st_size > 10_000 and (tmp_path / "limits.json").is_file()
    results = results_of_limits(rows, "d")
    assert json.loads((tmp_path / "limits.json").read_text())["bias: the ten most used words"]["held out"] == [
        list(pair) for pair in most_used
    ]
    assert f"`{most_used[0][0]}` {most_used[0][1]:.3f}, `{most_used[1][0]}`" in page
    assert len(results) == 2 * (len(rows) - 1) and {r["task_type"] for r in results} == {"image-feature-extraction"}


def test_data_without_images(pair, questions):
    with pytest.raises(ValueError, match="the held out data have no images"):
        report(*pair, {"held out": [question for question in questions if not question.images]})


def test_a_word_is_no_markdown():
    row = Row("bias", "the ten most used words", {"d": [("|", 0.5), ("`", 0.25), ("<b>", 0.125)]})
    assert "| `\\|` 0.500, `` ` `` 0.250, `<b>` 0.125 |" in markdown([row], "tiny")
