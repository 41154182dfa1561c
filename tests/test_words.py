"""Visual words as pictures."""

import numpy as np
import pytest
from PIL import Image

from helpers.conversations import picture, tiny_processor
from helpers.tiny import TOWERS, tiny_model
from modeling_vwlmm.processing import patch_grid
from modeling_vwlmm.words import draw_words, seen_image, top_words


def test_the_picture_lays_words_over_the_patches_they_belong_to():
    model = tiny_model()
    processor = tiny_processor(model.config)
    image = Image.new("RGB", (16, 16), (200, 0, 0))
    words = [[("mm", probability)] for probability in (1.0, 0.1, 0.5, 0.1)]
    drawn = np.asarray(draw_words(processor, [image], words=[words], size=160)).astype(int)
    overlay = drawn[10:170, 175:335].sum(-1)
    darkest = [overlay[y : y + 78, x : x + 78].min() for y in (1, 81) for x in (1, 81)]
    assert darkest[0] < darkest[2] < darkest[1] == darkest[3]
    assert len(top_words(model, processor, [image], k=2)[0][0]) == 2
    assert np.abs(np.asarray(seen_image(processor, image)).astype(int) - [200, 0, 0]).max() <= 1
    with pytest.raises(ValueError, match="3 patches are no grid over an image of 16 x 16 pixels"):
        draw_words(processor, [image], words=[words[:3]])


@pytest.mark.parametrize("tower", TOWERS)
def test_the_grid_of_words_is_that_of_the_tower(tower):
    model = tiny_model(tower=tower)
    processor = tiny_processor(model.config)
    words = top_words(model, processor, [picture(0)])
    rows, columns = TOWERS[tower][2]
    assert patch_grid(processor, len(words[0])) == (rows, columns)
    assert draw_words(processor, [picture(0)], words).size[0] > 0
