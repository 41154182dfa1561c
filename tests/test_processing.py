"""The processor: as many placeholders as patches, padding to a square as in LLaVA-1.5."""

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from helpers.conversations import picture, tiny_processor
from helpers.tiny import IMAGE_WITHIN, TOWERS, tiny_config, tiny_model
from modeling_vwlmm.processing import IMAGE_PARTS, make_processor


@pytest.mark.parametrize("tower", TOWERS)
def test_an_image_takes_a_placeholder_a_patch(tmp_path, tower):
    model = tiny_model(tower=tower)
    tiny_processor(model.config).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is LlavaProcessor
    inputs = processor(
        images=[[picture(0)], [picture(1, (9, 40)), picture(2)]],
        text=["w5 <image> w6", "<image> w7 <image>"],
        padding=True,
        return_tensors="pt",
    )
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert placeholders == [model.config.image_seq_length, 2 * model.config.image_seq_length]
    assert torch.isfinite(model(**inputs).logits).all()


def test_images_are_padded_with_the_mean_colour_or_cropped():
    def corner_and_centre(**config):
        processor = tiny_processor(tiny_config(**config))
        image = Image.new("RGB", (64, 16), (255, 0, 0))
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixel_values[:, 0, 0].tolist(), pixel_values[:, 8, 8].tolist()

    padded, centre = corner_and_centre()
    assert padded == pytest.approx([127 / 255 * 2 - 1] * 3, abs=1e-6) and centre == pytest.approx([1, -1, -1])
    cropped, centre = corner_and_centre(image_aspect_ratio="crop")
    assert cropped == centre == pytest.approx([1, -1, -1])


def test_an_image_token_that_is_not_the_configs_is_an_error():
    processor = tiny_processor(tiny_config())
    with pytest.raises(ValueError, match="<image> is token 99, but the config's image_token_id is 98"):
        make_processor(tiny_config(image_token_index=IMAGE_WITHIN), processor.tokenizer, [0.5] * 3, [0.5] * 3)


def test_images_that_do_not_match_their_placeholders_are_an_error():
    processor = tiny_processor(tiny_config())
    with pytest.raises(ValueError, match="Found total 2 <image> tokens and 1 images"):
        processor(images=[picture(0)], text=["<image> w5 <image>"])


def test_batches_are_padded_for_generation(tmp_path):
    processor = tiny_processor(tiny_config())
    processor.tokenizer.pad_token = None
    processor = make_processor(tiny_config(), processor.tokenizer, [0.5] * 3, [0.5] * 3)
    processor.save_pretrained(tmp_path)
    ids = AutoProcessor.from_pretrained(tmp_path)(text=["w5 w6 w7", "w5"], padding=True)["input_ids"]
    end_of_sequence = processor.tokenizer.eos_token_id
    assert ids[1] == [end_of_sequence, end_of_sequence, 5]


def test_a_tower_without_cls_token_that_would_lose_a_patch_is_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        assert tiny_config(tower="siglip").image_seq_length == 9 and not caplog.records
        assert tiny_config(tower="clip").image_seq_length == 4 and not caplog.records
        assert tiny_config(tower="siglip", vision_feature_select_strategy="default").image_seq_length == 8
    assert 'Use "full"' in caplog.text


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
def test_an_empty_turn_renders_as_nothing(content):
    """An LLM's own template, which knows texts alone, would print an empty list as []."""
    template = IMAGE_PARTS + "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    processor = tiny_processor(tiny_config(), template)
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": content}]
    assert processor.apply_chat_template(messages) == "<|user|><image><|end|><|assistant|><|end|>"
