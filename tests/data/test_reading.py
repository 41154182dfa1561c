"""What the LLM reads where images will stand."""

import numpy as np
import pytest
import torch

from helpers.reading import reading_processor, said, sample
from helpers.tiny import tiny_config
from modeling_vwlmm.data.reading import ReadingCollator, background_tokens, frequent_tokens, token_of, words_of


def test_the_words_of_a_conversation():
    text = "A great blue heron, a bird. It is an animal, yes! A bird; ein Vögelchen, 42 птица."
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Is it a plant?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    assert words_of(parts) == ["great", "blue", "heron", "bird", "animal", "ein", "vögelchen", "птица"]
    assert words_of(said(text, "plant")) == words_of(parts)


def test_a_word_is_one_token_or_none():
    processor = reading_processor(tiny_config())
    assert token_of("owl", processor.tokenizer) == 30 and token_of("heron", processor.tokenizer) is None
    assert background_tokens(processor.tokenizer) == [34, 35, 36, 37]
    assert frequent_tokens([said("owl bird"), said("bird heron")], processor.tokenizer) == [31, 30]
    with pytest.raises(ValueError, match="none of the words background, blank"):
        background_tokens(reading_processor(tiny_config(), ["owl"]).tokenizer)
    with pytest.raises(ValueError, match="no word that is one token"):
        frequent_tokens([said("heron")], processor.tokenizer)


class SpaceBefore:
    """A tokenizer that begins every text with a token of its own, as SentencePiece's legacy does with words."""

    unk_token_id = None

    def encode(self, text, add_special_tokens):
        return [7, *(len(word) for word in text.split())]


def test_a_token_that_begins_every_text_is_not_counted():
    assert token_of("owl", SpaceBefore()) == 3


def test_words_stand_on_a_rectangle_with_a_background_around_it():
    config = tiny_config(tower="siglip")  # 3 x 3 patches
    processor = reading_processor(config)
    collator = ReadingCollator(processor=processor, patches=9)
    examples = [sample("owl heron bird"), sample("cow", images=2), sample("bird", images=0)]
    batch = collator([dict(example) for example in examples])
    assert "pixel_values" not in batch and not (batch["input_ids"] == config.image_token_id).any()
    for row, (tokens, images) in enumerate([({30, 31}, 1), ({33}, 2), (set(), 0)]):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert ids[0] == 1  # then the images, one after another
        for i in range(images):
            place = slice(1 + 9 * i, 10 + 9 * i)
            grid = np.array(ids[place]).reshape(3, 3)
            is_word = grid < 34
            assert set(grid[is_word]) <= tokens and is_word.any() and set(grid[~is_word]) <= {34, 35, 36, 37}
            rows, columns = is_word.any(1).nonzero()[0], is_word.any(0).nonzero()[0]
            assert is_word[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert sum(label != -100 for label in labels[place]) == 8
            assert all(label in (-100, token) for label, token in zip(labels[place], ids[place], strict=True))
        # The rest is what it is with images
        plain = collator.processor(
            text=["<s>" + "<image>" * images + f" w20 w97 {examples[row]['messages'][1]['content']}</s>"],
            images=examples[row]["images"] or None,
            return_tensors="pt",
            add_special_tokens=False,
        )["input_ids"][0].tolist()
        assert ids[1 + 9 * images : len(plain)] == plain[1 + 9 * images :]


def test_the_same_batch_whichever_process_makes_it():
    collators = [
        ReadingCollator(processor=reading_processor(tiny_config()), patches=4, seed=seed) for seed in (0, 0, 1)
    ]
    rows = [sample("owl bird cow"), sample("bird")]
    first, again, other = (collator([dict(row) for row in rows])["input_ids"] for collator in collators)
    collators[0]([sample("cow")])  # no state
    assert torch.equal(first, again) and torch.equal(collators[0]([dict(row) for row in rows])["input_ids"], first)
    assert not torch.equal(first, other)


def test_a_sample_that_is_skipped_teaches_nothing(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    collator = ReadingCollator(processor=reading_processor(tiny_config()), patches=4, skip_broken_images=True)
    broken = {"images": [str(tmp_path / "broken.png")], "messages": said("owl")}
    batch = collator([broken, sample("owl")])
    assert batch["is_skipped"].tolist() == [True, False]
    assert (batch["labels"][0] == -100).all() and (batch["labels"][1] != -100).any()
