"""VW-LMM in lmms-eval, where that is installed: it takes an environment of its own."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from helpers import ROOT
from helpers.conversations import conversations, picture, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.evaluation.evaluate import evaluate
from modeling_vwlmm.evaluation.questions import questions_of


TASKS = Path(__file__).parent / "lmms_tasks"


pytest.importorskip("lmms_eval", reason='pip install "modeling-vwlmm[lmms-eval]" into an environment of its own')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def lm(folder):
    from lmms_eval.models import get_model

    model_class = get_model("vwlmm")  # failures of entry points are only logged, so that this one would be unknown
    assert model_class.__module__ == "modeling_vwlmm.evaluation.lmms" and not model_class.is_simple
    return model_class.create_from_arg_string(f"pretrained={folder}", {"batch_size": 3, "device": "cpu"})


def request_of(kind, *arguments):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "t", "doc_id": arguments[-3], "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


# Images a document, and the words of its question
DOCS = [(1, "w20"), (0, "w21 w22 w23"), (2, "w24 w25"), (1, "w26 w27 w28 w29"), (1, "w30"), (0, "w31"), (1, "w32 w33")]


def pictures(doc_id):
    return [picture(10 * doc_id + k) for k in range(DOCS[doc_id][0])]


def to_messages(doc):
    images = [{"type": "image", "url": image} for image in pictures(doc)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": DOCS[doc][1]}]}]


def one_by_one(lm, doc_id, text=None, **generation):
    """What a user would write."""
    parts = [*({"type": "image"} for _ in pictures(doc_id)), {"type": "text", "text": text or DOCS[doc_id][1]}]
    prompt = lm.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    images = pictures(doc_id) or None
    inputs = lm.processor(images=images, text=prompt, add_special_tokens=False, return_tensors="pt")
    generated = lm.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 5, **generation})
    return lm.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), inputs


def test_answers_are_those_of_generate_in_the_order_of_the_requests(lm):
    lm.task_dict = {"t": {"test": range(len(DOCS))}}
    lm.batch_size = 3
    settings = [{"max_new_tokens": 5, "until": ["\n\n"]}, {"max_new_tokens": 2, "temperature": 0, "top_p": 1.0}]
    requests = [
        request_of("generate_until", "", to_messages, settings[i % 2], i, "t", "test") for i in range(len(DOCS))
    ]
    expected = [one_by_one(lm, i, max_new_tokens=settings[i % 2]["max_new_tokens"])[0] for i in range(len(DOCS))]
    sizes, generate = [], lm.model.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    lm.model.generate = counted
    assert lm.generate_until(requests) == expected and len(set(expected)) > 4
    assert sorted(sizes) == [1, 3, 3]  # batches, of requests with the same settings


def test_an_answer_ends_where_the_task_says(lm):
    lm.task_dict = {"t": {"test": range(len(DOCS))}}
    whole, _ = one_by_one(lm, 0)
    second = whole.split()[1]
    requests = [request_of("generate_until", "", to_messages, {"max_new_tokens": 5, "until": second}, 0, "t", "test")]
    assert lm.generate_until(requests) == [whole[: whole.index(second)]]


def test_rounds_go_on_until_the_task_ends_them(lm):
    lm.task_dict = {"t": {"test": range(len(DOCS))}}

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return to_messages(doc)
        assert previous_round_info == (None if round_idx == 1 else f"{doc} {round_idx - 1}")
        if round_idx > doc % 3:
            return None, True, previous_output, None
        text = f"w40 {previous_output[-1].split()[0]}"
        images = [{"type": "image", "url": image} for image in pictures(doc)]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        return messages, False, previous_output, f"{doc} {round_idx}"

    requests = [
        request_of("generate_until_multi_round", "", rounds, {"max_new_tokens": 5}, i, "t", "test")
        for i in range(len(DOCS))
    ]
    found = lm.generate_until_multi_round(requests)
    for doc, said in enumerate(found):
        expected = [one_by_one(lm, doc)[0]]
        for _ in range(doc % 3):
            expected.append(one_by_one(lm, doc, f"w40 {expected[-1].split()[0]}")[0])
        assert said == expected


def test_the_loglikelihood_is_that_of_the_continuation(lm):
    lm.task_dict = {"t": {"test": range(len(DOCS))}}
    continuations = [f" {' '.join(f'w{40 + i + k}' for k in range(1 + i % 3))}" for i in range(len(DOCS))]
    continuations[3] = " " + one_by_one(lm, 3, max_new_tokens=2)[0]
    requests = [
        request_of("loglikelihood", DOCS[i][1], continuation, pictures, i, "t", "test")
        for i, continuation in enumerate(continuations)
    ]
    requests.append(request_of("loglikelihood", DOCS[0][1], lambda doc: continuations[0], pictures, 0, "t", "test"))
    found = lm.loglikelihood(requests)
    for i, continuation in enumerate(continuations):
        _, inputs = one_by_one(lm, i, max_new_tokens=1)
        expected, is_greedy = 0.0, True
        for token in lm.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                scores = lm.model(**inputs).logits[0, -1].double().log_softmax(-1)
            expected += scores[token].item()
            is_greedy &= scores.argmax().item() == token
            for name, value in (("input_ids", token), ("attention_mask", 1)):
                inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
        assert found[i] == (pytest.approx(expected, abs=1e-4), is_greedy)
    assert found[3][1] and not found[0][1] and found[-1] == pytest.approx(found[0])


def test_what_cannot_be_answered_is_an_error_and_no_empty_answer(lm, tmp_path):
    lm.task_dict = {"t": {"test": range(len(DOCS))}}
    (tmp_path / "broken.png").write_bytes(b"no image")

    def ask(part):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "w5"}]}]
        return lm.generate_until([request_of("generate_until", "", lambda doc: messages, {}, 2, "t", "test")])

    with pytest.raises(ValueError, match="sample document 2 of t, test: image .*broken.png: UnidentifiedImageError"):
        ask({"type": "image", "url": str(tmp_path / "broken.png")})
    with pytest.raises(ValueError, match="document 2 of t, test: found a part of type 'video'"):
        ask({"type": "video", "url": "a.mp4"})
    with pytest.raises(ValueError, match="batch_size is auto, expected a whole number"):
        type(lm)(pretrained="x", batch_size="auto", device="cpu")


def test_a_task_from_end_to_end(folder, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [
        {"id": f"q{i}", "images": row["images"][:1], "messages": [row["messages"][0]], "answer": "w7"}
        for i, row in enumerate(conversations((1, 1, 2, 1)).to_list())
    ]
    for i, row in enumerate(rows):
        row["messages"] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"w5 w{6 + i}"}]}]
    dataset = Dataset.from_list(rows)
    questions = questions_of(dataset)
    model = tiny_model()
    said = evaluate(model, tiny_processor(model.config), questions, max_new_tokens=3).answers
    rows = [{**row, "answer": said[i] if i % 4 else "wrong"} for i, row in enumerate(rows)]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "easy_vqa_test")
    monkeypatch.chdir(tmp_path)
    results = simple_evaluate(
        model="vwlmm",
        model_args=f"pretrained={folder}",
        tasks=["easy_vqa"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, model_name="vwlmm"),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results["results"]["easy_vqa"]["right_answers,none"] == 0.75
    samples = sorted(results["samples"]["easy_vqa"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == said


def test_the_tasks_of_the_recipe_are_there():
    from lmms_eval.tasks import TaskManager

    recipe = (ROOT / "recipes" / "evaluate.md").read_text()
    (tasks,) = re.findall(r"--tasks (\S+)", recipe)
    named = {*tasks.split(","), "vqav2_val", "vizwiz_vqa_val", "mmbench_en_dev_static"}
    assert named - set(TaskManager().all_tasks) == set() and all(f"`{name}`" in recipe for name in named)
