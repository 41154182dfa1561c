"""An evaluation of a tiny model: the same whatever the batches, and after a kill."""

import io
import json
import re

import pytest
from PIL import Image

from helpers.conversations import conversations, picture, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.evaluation import evaluate as module
from modeling_vwlmm.evaluation.evaluate import OVERALL, evaluate, results_of, table, write_results
from modeling_vwlmm.evaluation.generation import generate_answers
from modeling_vwlmm.evaluation.limits_page import markdown
from modeling_vwlmm.evaluation.limits_report import report
from modeling_vwlmm.evaluation.questions import Question, questions_of
from modeling_vwlmm.files import read_json
from modeling_vwlmm.hub.card_facts import read_eval_results, result_tables


@pytest.fixture(scope="module")
def pair():
    model = tiny_model()
    return model, tiny_processor(model.config)


@pytest.fixture
def questions():
    return questions_of(conversations())


def one_by_one(pair, question, new_tokens=5):
    """What a user would write."""
    model, processor = pair
    text = processor.apply_chat_template(question.prompt, add_generation_prompt=True)
    images = [picture_of(image) for image in question.images]
    inputs = processor(images=images or None, text=text, add_special_tokens=False, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def picture_of(image):
    return Image.open(io.BytesIO(image["bytes"]))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_are_those_of_generate_one_by_one(pair, questions, batch_size):
    found = evaluate(*pair, questions, batch_size=batch_size, max_new_tokens=5)
    assert found.answers == [one_by_one(pair, question) for question in questions]
    assert len(set(found.answers)) > 2


def test_figures_by_a_column(pair, questions):
    answers = evaluate(*pair, questions, max_new_tokens=5).answers
    for i, question in enumerate(questions):
        question.answers = [answers[i] if i % 2 else "wrong"]
        question.columns["kind"] = "odd" if i % 2 else "even"
    found = evaluate(*pair, questions, by=["kind"], max_new_tokens=5)
    figures = found.figures["exact_match"]
    assert (figures["odd"].mean, figures["even"].mean) == (1, 0)
    assert figures[OVERALL].mean == sum(found.scores["exact_match"]) / len(questions)
    assert [line.split()[0] for line in table(found).splitlines()] == ["right", "overall", "even", "odd"]


def test_a_killed_evaluation_goes_on(pair, questions, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    whole = evaluate(*pair, questions, answers_path=path, batch_size=2, max_new_tokens=5).answers
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(questions) and json.loads(lines[0]).keys() == {
        *("index", "id", "question", "references", "images", "answer", "run")
    }
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    asked = []
    generate = module.generate_answers

    def counted(model, processor, questions, *arguments, **generation):
        asked.extend(questions)
        return generate(model, processor, questions, *arguments, **generation)

    monkeypatch.setattr(module, "generate_answers", counted)
    assert evaluate(*pair, questions, answers_path=path, batch_size=2, max_new_tokens=5).answers == whole
    assert len(asked) == len(questions) - 2 and len(path.read_bytes().splitlines()) == len(questions)
    with pytest.raises(ValueError, match="answers of another model or other settings already: remove the file"):
        evaluate(*pair, questions, answers_path=path, max_new_tokens=6)
    with pytest.raises(ValueError, match="answers to other questions already"):
        evaluate(*pair, questions[::-1], answers_path=path, max_new_tokens=5)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        evaluate(*pair, questions, answers_path=path, max_new_tokens=5)


def test_results_are_those_that_the_card_reads(pair, questions, tmp_path):
    found = evaluate(*pair, questions, max_new_tokens=2)
    other = {**results_of(found, "d", "test")[0], "metric_name": "other", "metric_value": 0.5}
    write_results(tmp_path, [other])
    write_results(tmp_path, results_of(found, "d", "test"))
    path = write_results(tmp_path, results_of(found, "d", "test"))
    assert [result["metric_name"] for result in read_json(path)] == ["other", "right answers"]
    (shown,) = result_tables(read_eval_results(tmp_path, []))
    assert f"| d | test ({len(questions)} questions, 4 images) |" in shown.splitlines()[0]
    assert "| right answers | 0.0 [0.0, 0.0] |" in shown


def test_broken_images_are_named_skipped_and_counted(pair, tmp_path, caplog):
    questions = questions_of(conversations((1, 1, 2, 1)))
    whole = evaluate(*pair, questions, max_new_tokens=5)
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    broken = [i for i, question in enumerate(questions) if question.id.startswith(("1#", "2"))]
    for i in broken:  # of several images only one
        questions[i].images[-1] = {"path": str(path), "bytes": None}
        questions[i].__dict__.pop("image_key", None)
    answers = tmp_path / "answers.jsonl"
    found = evaluate(*pair, questions, batch_size=2, answers_path=answers, max_new_tokens=5)
    assert [questions.index(question) for question in found.skipped] == broken and len(broken) == 3
    kept = [i for i in range(len(questions)) if i not in broken]
    assert found.answers == [whole.answers[i] for i in kept] and found.questions == [questions[i] for i in kept]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and all("broken.png: UnidentifiedImageError" in line for line in named)
    assert re.search(r"not asked, for images that do not open +3 +2$", table(found).splitlines()[-1])
    assert results_of(found, "d", "test")[0]["dataset_args"]["questions skipped"] == 3
    assert "questions skipped" not in results_of(whole, "d", "test")[0]["dataset_args"]
    page = markdown(report(*pair, {"held out": questions}, max_new_tokens=2), "tiny")
    assert "| questions about images that do not open | 3 |" in page
    picture(1).save(path)  # whole again, they are asked
    assert not evaluate(*pair, questions, answers_path=answers, max_new_tokens=5).skipped


def test_bad_questions(pair, tmp_path):
    with pytest.raises(ValueError, match="no questions"):
        evaluate(*pair, [])
    question = Question("q7", [picture(0)], "no place for it", ["x"], {"question": "?"})
    with pytest.raises(ValueError, match=r"question q7 has 1 image\(s\), but its prompt has 0 <image> markers"):
        evaluate(*pair, [question])
    (tmp_path / "broken.png").write_bytes(b"no image")
    question = Question("q8", [{"path": str(tmp_path / "broken.png"), "bytes": None}], "<image> w5", ["x"])
    question.columns["question"] = "?"
    with pytest.raises(ValueError, match="none of the 1 questions can be asked: their images do not open"):
        evaluate(*pair, [question])
    with pytest.raises(ValueError, match="sample q8: image .*broken.png: UnidentifiedImageError"):
        list(generate_answers(*pair, [question]))
    with pytest.raises(ValueError, match="1 questions have no right answer, the first is q9"):
        evaluate(*pair, [Question("q9", [], "w5", [], {"question": "w5"})])
