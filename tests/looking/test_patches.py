"""What the LLM expected at a patch beside its visual word."""

import pytest
import torch

from helpers.conversations import picture, tiny_processor
from helpers.tiny import LLMS, tiny_model
from modeling_vwlmm.looking.patches import read_patches
from modeling_vwlmm.processing import question_about


@pytest.mark.parametrize("pseudo", [False, True])
@pytest.mark.parametrize("llm", [LLMS[0], LLMS[-1]])
def test_a_patch_is_read_from_the_position_before_it(llm, pseudo):
    model = tiny_model(llm, pseudo_image_features=pseudo)
    processor = tiny_processor(model.config)
    patches = read_patches(model, processor, picture(0), k=4)
    inputs = question_about(processor, [picture(0)], "w20 w21")  # what follows the image changes nothing
    with torch.no_grad():
        p = model(**inputs).logits[0].double()[:, : model.config.visual_vocab_size].softmax(-1)
        w = model.visual_words(inputs["pixel_values"])[0].double()
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    assert len(positions) == len(patches) == 4
    for t, own, patch in zip(positions, w, patches, strict=True):
        for said, distribution in ((patch.words, own), (patch.expected, p[t - 1])):
            best = distribution.topk(4)
            assert [probability for _, probability in said] == pytest.approx(best.values.tolist(), rel=1e-4)
            assert [word for word, _ in said] == [processor.tokenizer.decode([i]) for i in best.indices.tolist()]
        assert patch.kl == pytest.approx((own * (own / p[t - 1]).log()).sum().item(), rel=1e-4)


def test_the_divergences_are_the_loss():
    model = tiny_model()
    processor = tiny_processor(model.config)
    inputs = question_about(processor, [picture(0)], "")
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).vw_loss.item()
    assert sum(patch.kl for patch in read_patches(model, processor, picture(0))) / 4 == pytest.approx(loss, rel=1e-5)


def test_nothing_is_expected_of_a_patch_that_nothing_precedes():
    model = tiny_model()
    processor = tiny_processor(model.config)
    processor.chat_template = "<image>"
    first, *others = read_patches(model, processor, picture(0))
    assert first.expected is None and first.kl is None and all(patch.kl > 0 for patch in others)
    processor.chat_template = None  # the tokenizer adds nothing before the image either
    assert [patch.kl is None for patch in read_patches(model, processor, picture(0))] == [True, False, False, False]
