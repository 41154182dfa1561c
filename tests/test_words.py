"""Visual words as pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from helpers.conversations import picture, tiny_processor
from helpers.pictures import pixels_of
from helpers.tiny import TOWERS, llm_config, tiny_model, tower_config
from modeling_vwlmm import VWLmmConfig
from modeling_vwlmm.drawing import DPI, fonts_for
from modeling_vwlmm.processing import patch_grid
from modeling_vwlmm.words import CELL, SMALLEST, draw_words, most_frequent_word, readable, seen_image, top_words


def fake(words, probability=0.9):
    return [[[(word, probability)] for word in words]]


def words_in(figure):
    """The texts of a figure with their sizes in pixels and their places."""
    return [(t.get_text(), t.get_fontsize() * DPI / 72, t.get_position()) for t in figure.axes[0].texts]


def test_the_picture_lays_words_over_the_patches_they_belong_to():
    model = tiny_model()
    processor = tiny_processor(model.config)
    image = Image.new("RGB", (16, 16), (200, 0, 0))
    words = [[("mm", 1.0)], [("m", 0.1)], [("mm", 0.5)], [("m", 0.1)]]
    drawn = pixels_of(draw_words(processor, [image], words=[words], size=160))
    assert (drawn[60, 60] == [200, 0, 0]).all()
    overlay = drawn[24:184, 196:356].sum(-1)
    darkest = [overlay[y : y + 76, x : x + 76].min() for y in (2, 82) for x in (2, 82)]
    assert darkest[0] < darkest[2] < darkest[1] == darkest[3]
    assert len(top_words(model, processor, [image], k=2)[0][0]) == 2
    assert np.abs(np.asarray(seen_image(processor, image)).astype(int) - [200, 0, 0]).max() <= 1
    with pytest.raises(ValueError, match="3 patches are no grid over an image of 16 x 16 pixels"):
        draw_words(processor, [image], words=[words[:3]])
    with pytest.raises(ValueError, match="expected a list of 1 images, as words has, found 2 of them"):
        draw_words(processor, [image, image], words=[words])
    with pytest.raises(ValueError, match="found one by itself"):
        draw_words(processor, image, words=[words])
    with pytest.raises(ValueError, match="expected 1 captions, one an image, found 2"):
        draw_words(processor, [image], words=[words], captions=["a", "b"])
    with pytest.raises(ValueError, match="found no image"):
        top_words(model, processor, [])


@pytest.mark.parametrize("tower", TOWERS)
def test_the_grid_of_words_is_that_of_the_tower(tower):
    model = tiny_model(tower=tower)
    processor = tiny_processor(model.config)
    words = top_words(model, processor, [picture(0)])
    rows, columns = TOWERS[tower][2]
    assert patch_grid(processor, len(words[0])) == (rows, columns)
    height, width, _ = pixels_of(draw_words(processor, [picture(0)], words)).shape
    assert height - 48 == 384 * rows // max(rows, columns)
    assert width - 72 == 2 * 384 * columns // max(rows, columns)


def test_equal_neighbours_in_a_row_have_their_word_once():
    processor = tiny_processor(tiny_model(tower="siglip").config)
    words = ["cat", "cat", "dog", "dog", "dog", "dog", "cat", "dog", "cat"]
    figure = draw_words(processor, [picture(0)], fake(words))
    assert [word for word, _, _ in words_in(figure)] == ["cat", "dog", "dog", "cat", "dog", "cat"]
    boxes = [(box.get_x() - 420, box.get_y() - 24, box.get_width()) for box in figure.axes[0].patches]
    assert boxes == [(0, 0, 256), (256, 0, 128), (0, 128, 384), (0, 256, 128), (128, 256, 128), (256, 256, 128)]


def test_576_words_can_be_read():
    tower = CLIPVisionConfig(**{**tower_config().to_dict(), "patch_size": 14, "image_size": 336})
    processor = tiny_processor(VWLmmConfig(vision_config=tower, text_config=llm_config(), image_token_index=99))
    words = ["cat", "amphibian", "internationalization", "⏎"] * 144
    figure = draw_words(processor, [picture(0)] * 2, fake(words) * 2, ["a caption"] * 2)
    texts = words_in(figure)
    assert min(size for _, size, _ in texts) >= SMALLEST and len(texts) == 2 * 577
    assert [word for word, _, _ in texts[:4]] == ["cat", "amphib…", "interna…", "⏎"]
    fonts = fonts_for(["…"])
    assert all(fonts.width(word) * size < CELL for word, size, _ in texts[:576])
    assert figure.bbox.size.round().tolist() == [2 * 24 * CELL + 72, 24 + 2 * (24 * CELL + 72)]  # one image a row


def test_relative_words_are_those_that_say_most_about_a_patch():
    model = tiny_model()
    processor = tiny_processor(model.config)
    images = [picture(i) for i in range(3)]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        visual_words = model.visual_words(pixel_values).double()
    mean = visual_words.flatten(0, 1).mean(0)
    for image, patches in zip(visual_words, top_words(model, processor, images, k=2, relative=True), strict=True):
        for w, words in zip(image, patches, strict=True):
            ids = (w * (w / mean).log()).topk(2).indices.tolist()
            assert [word for word, _ in words] == [processor.tokenizer.decode([i]) for i in ids]
            assert [probability for _, probability in words] == pytest.approx(w[ids].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    "text, name, shown",
    [
        *[("\n", "Ċ", "⏎"), ("\n\n", "ĊĊ", "⏎⏎"), ("  ", "▁▁", "␣␣"), ("\t", "ĉ", "⇥"), (" cat", "Ġcat", "cat")],
        *[("", "<s>", "<s>"), ("<|end|>", "<|end|>", "<|end|>"), (")\n}", ")Ċ}", ")⏎}")],
        *[("\u200d", "âĢį", "<U+200D>"), ("\x00", "Ā", "<U+0000>"), ("\u0301", "Ìģ", "◌\u0301")],
        # Parts of characters: of a tokenizer that cuts texts into bytes, and of sentencepiece
        *[("\ufffd", "çĮ", "\\xe7\\x8c"), (" \ufffd", "Ġä¸", "\\xe4\\xb8"), ("\ufffd", "<0xE7>", "<0xE7>")],
    ],
)
def test_every_token_can_be_seen(text, name, shown):
    class Tokenizer:
        def decode(self, ids):
            return text

        def convert_ids_to_tokens(self, token_id):
            return name

    assert readable(Tokenizer(), 1) == shown


def test_the_most_frequent_word():
    words = [[[("a", 0.5), ("b", 0.4)], [("b", 0.5)]], [[("b", 0.9)], [("b", 0.3)]]]
    assert most_frequent_word(words) == ("b", 0.75)
