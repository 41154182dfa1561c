"""Figures as pixels."""

import io

import numpy as np
from PIL import Image


def pixels_of(figure):
    """An array (height, width, 3) of integers."""
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return np.asarray(Image.open(written).convert("RGB")).astype(int)
