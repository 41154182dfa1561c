"""Each measure of the limits report on a case made by hand, whose answer is known."""

import numpy as np
import pytest
import torch

from modeling_vwlmm.evaluation import limits


def test_information_loss():
    f = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    pseudo = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -2.0]])
    assert limits.cosine(f, pseudo).tolist() == pytest.approx([1, 0, -1])
    assert limits.relative_error(f, pseudo).tolist() == pytest.approx([0, 2**0.5, 2])


def test_expressiveness():
    words = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert limits.perplexity(words).tolist() == pytest.approx([4, 1, 2])
    assert limits.top_mass(words, 1).tolist() == [0.25, 1, 0.5]
    assert limits.top_mass(words, 3).tolist() == [0.75, 1, 1]
    assert limits.top_mass(words, 10).tolist() == [1, 1, 1]


def test_bias():
    assert limits.vocabulary_used(np.array([[3, 3], [5, 3]])) == 2
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert limits.most_used(mean, 2) == [(3, pytest.approx(0.4)), (2, pytest.approx(0.3))]
    assert limits.mass_of_most_used(mean, 2) == pytest.approx(0.7)
    assert limits.mass_of_most_used(mean) == pytest.approx(1)
    assert limits.mass_of(mean, [0, 1, 99]) == pytest.approx(0.3)


def test_words_that_may_name_something():
    assert limits.words_in(["A great blue heron.", "Yes, it is an été"]) == {"great", "blue", "heron", "été"}


def test_names_are_found_in_the_vocabulary_in_the_singular_and_plural():
    vocabulary = ["<s>", "bird", "birds", " Bird", "cat", "buses"]
    found = limits.name_matrix(vocabulary, [{"birds"}, {"dog"}, {"cats", "bird"}])
    assert [row.nonzero()[0].tolist() for row in found] == [[1, 2, 3], [], [1, 2, 3, 4]]


def test_naming_counts_the_own_image_and_the_share_of_others():
    is_name = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=bool)
    top = np.array([[[0, 3], [1, 3]], [[1, 0], [3, 3]], [[2, 3], [1, 2]]])
    own, others = limits.naming(top, is_name)
    assert own.tolist() == [[1, 0], [1, 0], [1, 1]]
    assert others.tolist() == [[0, 1], [1, 0], [0, 0.5]]


def test_a_word_that_is_everywhere_gains_nothing():
    is_name = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=bool)
    own, others = limits.naming(np.tile([0, 1], (4, 1, 1)), is_name)
    assert own.tolist() == others.tolist() == [[1]] * 4
    own, others = limits.naming(np.zeros((1, 1, 1), int), is_name[:1])
    assert (own.item(), others.item()) == (1, 0)
