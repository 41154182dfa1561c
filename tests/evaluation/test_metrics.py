"""Scores of answers, compared with cases whose value is known."""

import pytest

from modeling_vwlmm.evaluation.metrics import (
    METRICS,
    check_metrics,
    exact_match,
    fitting_metrics,
    normalize,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    "answer, normalized",
    [
        ("The  Cat.", "cat"),
        ("a red, round ball!", "red round ball"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("black/white", "black white"),
        ("t-shirt\n", "t shirt"),
        ("yes .", "yes"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_in_the_vqa_challenge(answer, normalized):
    assert normalize(answer) == normalized


def test_exact_match_takes_any_of_the_references():
    assert exact_match("A dog.", ["cat", "Dog"]) == 1
    assert exact_match("dogs", ["cat", "dog"]) == 0


@pytest.mark.parametrize("matches, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_out_each_of_ten_people(matches, accuracy):
    assert vqa_accuracy("Red.", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(accuracy)


def test_rouge_l():
    pytest.importorskip("pycocoevalcap")
    # Longest common subsequence "a bird sits", 3 of 4 words said and 3 of 5 wanted, beta 1.2
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    (value,) = METRICS["rouge_l"](["A bird sits here."], [["a small bird sits there"]])
    assert value == pytest.approx(expected)


def test_cider_is_ten_where_the_caption_is_the_reference_and_zero_where_it_shares_nothing():
    pytest.importorskip("pycocoevalcap")
    references = [["a red bird on a tree"], ["two dogs run over grass"], ["some plate with food here"]]
    same, other, none = METRICS["cider"]([references[0][0], "A red bird on a tree.", "x"], references)
    assert same == pytest.approx(10) and other == none == 0


def test_metrics_that_do_not_fit_the_data():
    assert fitting_metrics([["yes"]]) == ["exact_match"]
    assert fitting_metrics([["yes"] * 10]) == ["vqa_accuracy"]
    with pytest.raises(ValueError, match="4 or more a question, and a question has 1: exact_match fits"):
        check_metrics(["vqa_accuracy"], [["yes"] * 10, ["no"]])
    with pytest.raises(ValueError, match="all references are the same"):
        check_metrics(["cider"], [["yes"], ["yes"]])
    with pytest.raises(ValueError, match='no metric "bleu", expected some of exact_match, vqa_accuracy, rouge_l, cid'):
        check_metrics(["bleu"], [["yes"]])
