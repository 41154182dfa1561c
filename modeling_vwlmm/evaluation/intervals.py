"""How far a figure would move with other images: the bootstrap."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval, and of how many values and images it is."""

    mean: float
    low: float
    high: float
    values: int
    images: int


def interval(
    values: Sequence[float] | np.ndarray,
    images: Sequence[Hashable] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of values and its 95 % interval over images drawn anew.

    Questions about one image stand or fall together, so that images are drawn, not questions: intervals over
    questions would be too narrow (a cluster bootstrap, percentiles).

    Args:
        values (`(N,)`): a figure of each question.
        images: the image of each question; a question is an image of its own if not given.
        samples, seed: how many times as many images as there are get drawn, and with which random numbers.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("there is nothing to take the mean of")
    numbers: dict[Hashable, int] = {}
    of_image = np.array([numbers.setdefault(image, len(numbers)) for image in images or range(len(values))])
    sums, counts = np.bincount(of_image, values), np.bincount(of_image)
    generator = np.random.default_rng(seed)
    at_once = max(1, min(samples, 20_000_000 // len(sums)))
    means: list[float] = []
    while len(means) < samples:
        drawn = generator.integers(len(sums), size=(min(at_once, samples - len(means)), len(sums)))
        means += list(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values), len(sums))
