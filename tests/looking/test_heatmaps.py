"""Where a word is."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command_line import error_of
from helpers.conversations import picture, tiny_processor
from helpers.pictures import pixels_of
from helpers.tiny import tiny_model
from modeling_vwlmm.cli import main
from modeling_vwlmm.looking.heatmaps import draw_heatmaps, word_probabilities


def test_the_probabilities_are_those_of_the_visual_words():
    model = tiny_model()
    processor = tiny_processor(model.config)
    images = [picture(0), picture(1)]
    found = word_probabilities(model, processor, images, ["w20", "W30"])
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        words = model.visual_words(pixel_values)
    assert found == pytest.approx(words[..., [20, 30]].transpose(1, 2).numpy())


def test_the_patch_with_the_word_is_the_brightest():
    processor = tiny_processor(tiny_model().config)
    image = Image.new("RGB", (16, 16), (128, 128, 128))
    figure = draw_heatmaps(processor, [image], ["w"], np.array([[[0.0, 0.1, 0.5, 0.0]]]), size=100)
    heat = pixels_of(figure).sum(-1)[28:128, 108:208]
    means = [heat[y : y + 46, x : x + 46].mean() for y in (2, 52) for x in (2, 52)]
    assert means[2] > means[1] > means[0] == means[3]


def test_colours_of_a_word_are_the_same_for_all_images():
    processor = tiny_processor(tiny_model().config)
    image = Image.new("RGB", (16, 16), (128, 128, 128))
    probabilities = np.array([[[0.0, 0.0, 0.5, 0.0]], [[0.0, 0.0, 0.1, 0.0]]])
    both = pixels_of(draw_heatmaps(processor, [image] * 2, ["w"], probabilities, size=100)).sum(-1)
    alone = pixels_of(draw_heatmaps(processor, [image], ["w"], probabilities[1:], size=100)).sum(-1)
    row = (both.shape[0] - 4) // 2  # the margin below is 4
    first, second = (both[y + 28 + 52 : y + 28 + 98, 110:156].mean() for y in (0, row))
    assert first > second and alone[80:126, 110:156].mean() == pytest.approx(first)


def test_heatmaps_from_the_command_line(tmp_path, model_folder, capsys):
    picture(0).save(tmp_path / "a.png")
    arguments = ["words", str(model_folder), str(tmp_path / "a.png"), "--output", str(tmp_path / "heat.png")]
    main([*arguments, "--heatmap", "w20", "w30"])
    assert Image.open(tmp_path / "heat.png").size[0] > 3 * 288
    main([*arguments[:-1], str(tmp_path / "heat.svg"), "--heatmap", "w20"])
    assert (tmp_path / "heat.svg").read_text().startswith("<?xml")
    assert 'no single word "w2x", near it are' in error_of(capsys, *arguments, "--heatmap", "w2x")
