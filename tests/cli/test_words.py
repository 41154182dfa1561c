"""`vwlmm words`."""

import json

import pytest
import torch
from PIL import Image

from helpers.command_line import error_of
from helpers.conversations import picture, tiny_processor
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main
from modeling_vwlmm.looking.patches import read_patches


def test_words_draws_and_prints(tmp_path, capsys, model_folder):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    main(["words", str(model_folder), *paths, "--output", str(tmp_path / "words.png"), "--json", "--expected"])
    printed = json.loads(capsys.readouterr().out)
    model = VWLmmForCausalLM.from_pretrained(model_folder).eval()
    processor = tiny_processor(model.config)
    pixel_values = processor.image_processor([picture(i) for i in range(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model.visual_words(pixel_values)
    for image, path, expected in zip(printed, paths, probabilities, strict=True):
        assert image["image"] == path and len(image["patches"]) == model.config.image_seq_length
        for patch, distribution in zip(image["patches"], expected, strict=True):
            assert [probability for _, probability in patch] == pytest.approx(distribution.topk(3).values.tolist())
            assert patch[0][0] == processor.tokenizer.decode([distribution.argmax()])
    assert Image.open(tmp_path / "words.png").size[0] > 1000
    for image, drawn in zip(printed, [picture(i) for i in range(3)], strict=True):
        patches = read_patches(model, processor, drawn, 3)
        assert image["kl"] == pytest.approx([patch.kl for patch in patches])
        assert [[word for word, _ in patch] for patch in image["expected"]] == [
            [word for word, _ in patch.expected] for patch in patches
        ]


def test_what_cannot_be_drawn_is_refused_before_the_model_is_read(tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    arguments = "words", "missing", str(tmp_path / "a.png"), "--output", str(tmp_path / "words")
    assert "found no format of pictures in its name, expected .eps, " in error_of(capsys, *arguments)
    arguments = *arguments[:-1], str(tmp_path / "nowhere" / "a.png")
    assert f"there is no folder {tmp_path / 'nowhere'}" in error_of(capsys, *arguments)
    assert "--expected is for --json" in error_of(capsys, *arguments, "--expected")


def test_words_does_not_replace_an_image_that_it_reads(tmp_path, capsys, model_folder):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    before = (tmp_path / "a.png").read_bytes()
    for output in ("a.png", "b.png"):
        message = error_of(
            capsys, "words", str(model_folder), str(tmp_path / "a.png"), "--output", str(tmp_path / output)
        )
        assert "which it would replace" in message
    assert (tmp_path / "a.png").read_bytes() == before
