"""The bootstrap over images."""

import numpy as np
import pytest

from modeling_vwlmm.evaluation.intervals import interval


def test_the_interval_of_one_question_an_image_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).random(400) < 0.7
    found = interval(values)
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.mean == values.mean() and found.images == found.values == 400
    assert found.low == pytest.approx(values.mean() - error, abs=0.01)
    assert found.high == pytest.approx(values.mean() + error, abs=0.01)


def test_ten_questions_that_stand_or_fall_with_their_image_count_as_one():
    rights = np.random.default_rng(2).random(100) < 0.5
    once, ten_times = interval(rights), interval(np.repeat(rights, 10), list(np.repeat(np.arange(100), 10)))
    over_questions = interval(np.repeat(rights, 10))
    assert ten_times[:3] == pytest.approx(once[:3])
    assert over_questions.high - over_questions.low < 0.5 * (once.high - once.low)


def test_images_count_by_their_questions():
    found = interval([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert found == (0.75, 0.0, 1.0, 4, 2)


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="nothing"):
        interval([])
