"""The model against transformers' own, on every pairing of LLM with tower."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from helpers.cases import IMAGE_TOKENS, PADDING, PSEUDO, Calls
from helpers.tiny import (
    CONV_TOWERS,
    IMAGE,
    IMAGE_BEYOND,
    IMAGE_FAR_BEYOND,
    IMAGE_WITHIN,
    LLMS,
    ROWS,
    TEXT_ROWS,
    TOWERS,
    VOCAB_SIZE,
    gradients,
    llm_config,
    rows_of,
    tiny_batch,
    tiny_config,
    tiny_model,
    tower_config,
    without_labels,
)
from modeling_vwlmm.naive import naive_divergence


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_forward(llm, tower):
    model = tiny_model(llm, tower, visual_word_loss_weight=0.5)
    batch = tiny_batch(model.config)
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, VOCAB_SIZE)
    assert out.lm_loss.isfinite() and out.vw_loss.isfinite() and out.vw_loss > 0
    assert_close(out.loss, out.lm_loss + 0.5 * out.vw_loss, rtol=1e-6, atol=0)
    height, width = TOWERS[tower][2]
    images = len(batch["pixel_values"])
    assert model.config.image_seq_length == height * width
    assert out.image_hidden_states.shape == (images, height * width, model.config.text_config.hidden_size)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == llm.endswith("-tied")


@pytest.mark.parametrize("tower", CONV_TOWERS)
def test_cells_of_a_feature_map_are_patches_row_by_row(tower):
    model = tiny_model(tower=tower)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    feature_map = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    height, width = TOWERS[tower][2]
    assert feature_map.shape[-2:] == (height, width) and height != width
    features = model.model.get_image_features(pixel_values).pooler_output
    for row in range(height):
        for column in range(width):
            expected = model.model.multi_modal_projector(feature_map[:, :, row, column])
            assert_close(features[:, row * width + column], expected)


def test_several_vision_feature_layers():
    model = tiny_model(tower="clip", vision_feature_layer=[0, -1], vision_feature_select_strategy="full")
    pixel_values = tiny_batch(model.config)["pixel_values"]
    hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = torch.cat([hidden_states[0], hidden_states[-1]], dim=-1)
    found = model.model.get_image_features(pixel_values).pooler_output
    assert_close(found, model.model.multi_modal_projector(features))
    assert found.shape[1] == model.config.image_seq_length == 5


@pytest.mark.parametrize("llm", LLMS)
def test_text_equals_stock_llava(llm):
    model = tiny_model(llm, image_token_index=IMAGE_WITHIN, visual_word_loss_weight=0.0)
    config = model.config
    stock = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower_config(), text_config=llm_config(llm), image_token_index=IMAGE_WITHIN)
    ).eval()
    weights = model.state_dict()
    del weights["model.vm_head.weight"]
    stock.load_state_dict(weights)
    for padding in ("right", "left"):
        batch = tiny_batch(config, padding=padding)
        out, expected = model(**batch), stock(**batch)
        assert_close(out.logits, expected.logits, rtol=1e-6, atol=1e-6)
        assert_close(out.lm_loss, expected.loss, rtol=1e-6, atol=0)
        assert out.loss == out.lm_loss
        found = gradients(out.loss, model)
        assert not found.pop("model.vm_head.weight").any()
        assert_close(found, gradients(expected.loss, stock), rtol=1e-5, atol=1e-6)


@IMAGE_TOKENS
@pytest.mark.parametrize("llm", LLMS)
def test_text_equals_the_llm_alone(llm, image_token_index):
    model = tiny_model(llm, image_token_index=image_token_index)
    alone = AutoModelForCausalLM.from_config(llm_config(llm)).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    batch = tiny_batch(model.config, TEXT_ROWS)
    out, expected = model(**batch), alone(**batch)
    assert torch.equal(out.logits, expected.logits)
    assert out.loss == out.lm_loss == expected.loss and out.vw_loss is None
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE


@PSEUDO
def test_the_image_token_makes_no_difference(pseudo):
    found = []
    for image_token_index in (IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND):
        model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
        found.append(model(**tiny_batch(model.config)))
    for other in found[1:]:
        assert torch.equal(found[0].logits, other.logits)
        assert found[0].lm_loss == other.lm_loss and found[0].vw_loss == other.vw_loss


@PSEUDO
@PADDING
@pytest.mark.parametrize("tower", ["clip", "siglip", "resnet"])
def test_batched_equals_single(tower, padding, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    rows = (*ROWS, (4, IMAGE, IMAGE, IMAGE, 2), (9,))
    batch = tiny_batch(model.config, rows, padding=padding)
    out = model(**batch)
    lm_loss = vw_loss = tokens = positions = 0
    for i, row in enumerate(rows_of(model.config, batch)):
        single = model(**row)
        assert_close(out.logits[i][batch["attention_mask"][i].bool()], single.logits[0], rtol=1e-5, atol=1e-5)
        row_tokens = (row["labels"][:, 1:] != -100).sum()
        row_positions = (row["input_ids"][:, 1:] == model.config.image_token_id).sum()
        lm_loss, tokens = lm_loss + single.lm_loss * row_tokens, tokens + row_tokens
        if row_positions:
            vw_loss, positions = vw_loss + single.vw_loss * row_positions, positions + row_positions
        else:
            assert single.vw_loss is None
    assert_close(out.lm_loss, lm_loss / tokens, rtol=1e-5, atol=1e-5)
    assert_close(out.vw_loss, vw_loss / positions, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("visual_vocab_size", [VOCAB_SIZE, 77])
def test_pseudo_image_features(visual_vocab_size):
    model = tiny_model(pseudo_image_features=True, visual_vocab_size=visual_vocab_size)
    batch = tiny_batch(model.config)
    read = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    out = model(**batch)
    words, embeddings = model.visual_words(batch["pixel_values"]), model.get_input_embeddings().weight
    expected = torch.zeros_like(out.image_hidden_states)
    for v in range(visual_vocab_size):
        expected += words[..., v, None] * embeddings[v]
    is_image = batch["input_ids"] == IMAGE_BEYOND
    assert_close(read[0][is_image], expected.flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(read[0][~is_image], embeddings[batch["input_ids"][~is_image]])
    outputs = model.model.get_image_features(batch["pixel_values"])
    assert torch.equal(out.image_hidden_states, outputs.image_hidden_states)
    # Servers encode images first, and feed this to the LLM as it is
    assert torch.equal(read[0][is_image], outputs.pooler_output.flatten(0, 1))


@PSEUDO
def test_the_text_loss_reaches_the_vm_head_through_pseudo_image_features(pseudo):
    model = tiny_model(pseudo_image_features=pseudo, visual_word_loss_weight=0.0)
    found = gradients(model(**tiny_batch(model.config)).loss, model)
    assert found["model.vm_head.weight"].any() == pseudo
    assert found["model.multi_modal_projector.linear_1.weight"].any()


@PSEUDO
@pytest.mark.parametrize("llm", ["llama", "llama-tied"])
def test_tokens_added_later_change_no_visual_word(llm, pseudo):
    model = tiny_model(llm, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    words, out = model.visual_words(batch["pixel_values"]), model(**batch)
    model.resize_token_embeddings(VOCAB_SIZE + 6, mean_resizing=False)
    assert model.lm_head.weight.shape[0] == VOCAB_SIZE + 6
    resized_words, resized = model.visual_words(batch["pixel_values"]), model(**batch)
    assert torch.equal(words, resized_words) and words.shape[-1] == VOCAB_SIZE
    assert_close(resized.vw_loss, out.vw_loss, rtol=1e-6, atol=0)
    assert_close(resized.logits[..., :VOCAB_SIZE], out.logits, rtol=1e-5, atol=1e-6)
    assert resized.logits.shape[-1] == VOCAB_SIZE + 6 and resized.lm_loss > out.lm_loss


def test_a_smaller_visual_vocabulary():
    model = tiny_model(visual_vocab_size=77)
    batch = tiny_batch(model.config, [(3, IMAGE, 2)])
    out, words = model(**batch), model.visual_words(batch["pixel_values"])
    assert words.shape == (1, 4, 77) and out.logits.shape[-1] == VOCAB_SIZE
    expected = naive_divergence(out.logits[0, 2:6], words[0].log()) / 4
    assert_close(out.vw_loss, expected, rtol=1e-5, atol=0)


@IMAGE_TOKENS
def test_visual_words(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    words = model.visual_words(pixel_values)
    assert words.shape == (len(pixel_values), 4, VOCAB_SIZE) and words.dtype == torch.float32
    assert_close(words.sum(-1), torch.ones(len(pixel_values), 4))
    features = model.model.get_image_features(pixel_values).pooler_output
    expected = (features @ model.model.vm_head.weight.T).exp()
    assert_close(words, expected / expected.sum(-1, keepdim=True))


def test_losses_are_there_where_they_should_be():
    model = tiny_model()
    batch = tiny_batch(model.config)
    out = model(**without_labels(batch))
    assert out.loss is None and out.lm_loss is None and out.vw_loss is None
    out = model(**batch)
    assert all(out[name] is not None for name in ("loss", "lm_loss", "vw_loss", "logits"))
    out_tuple = model(**batch, return_dict=False)
    assert isinstance(out_tuple, tuple) and torch.equal(out_tuple[0], out.loss)
    out = model(**tiny_batch(model.config, TEXT_ROWS))
    assert out.vw_loss is None and torch.equal(out.loss, out.lm_loss)
    model.config.visual_word_loss_weight = 0.0
    vm_head = Calls(model.model.vm_head)
    out = model(**batch)
    assert out.vw_loss is None and torch.equal(out.loss, out.lm_loss) and not vm_head.lengths


def test_the_weight_scales_the_gradients_of_the_visual_word_loss():
    found = {}
    for weight in (0.0, 1.0, 3.0):
        model = tiny_model(visual_word_loss_weight=weight)
        found[weight] = gradients(model(**tiny_batch(model.config)).loss, model)
    for name, at_0 in found[0.0].items():
        assert_close(found[3.0][name] - at_0, 3 * (found[1.0][name] - at_0), rtol=1e-4, atol=1e-5)
    assert (found[1.0]["lm_head.weight"] - found[0.0]["lm_head.weight"]).abs().max() > 1e-3


@IMAGE_TOKENS
@pytest.mark.parametrize("images,message", [(3, "16 .*3 .*12"), (5, "16 .*5 .*20")])
def test_placeholders_that_do_not_match_the_images(images, message, image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    batch = tiny_batch(model.config)
    batch["pixel_values"] = batch["pixel_values"].repeat(2, 1, 1, 1)[:images]
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_placeholders_without_images():
    """A token of the vocabulary is read as the token that it is, as in LLaVA. One beyond it has nothing to read."""
    model = tiny_model(image_token_index=IMAGE_WITHIN)
    batch = tiny_batch(model.config)
    del batch["pixel_values"]
    out = model(**batch)
    read = model.model.language_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert_close(out.logits, model.lm_head(read))
    assert out.vw_loss is None
    with pytest.raises(ValueError, match="16 .*0 .*0"):
        tiny_model()(input_ids=tiny_batch(tiny_config())["input_ids"])


def test_images_without_placeholders():
    model = tiny_model()
    batch = tiny_batch(model.config, TEXT_ROWS)
    with pytest.raises(ValueError, match="0 .*2 .*8"):
        model(**batch, pixel_values=torch.zeros(2, 3, 16, 16))


def test_inputs_embeds():
    model = tiny_model()
    batch = tiny_batch(model.config, TEXT_ROWS)
    expected = model(**batch)
    input_ids = batch.pop("input_ids")
    inputs_embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(**batch, inputs_embeds=inputs_embeds).loss, expected.loss)
    for both in ({}, {"input_ids": input_ids, "inputs_embeds": inputs_embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**both)


@PSEUDO
@IMAGE_TOKENS
def test_inputs_embeds_with_images(image_token_index, pseudo):
    """As in LLaVA, images go where the embedding is that of the image token."""
    model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    expected = model(**batch)
    inputs = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    images = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    del inputs["input_ids"]
    for given in ({"pixel_values": batch["pixel_values"]}, {"mm_encoder_outputs": {"image": images}}):
        out = model(**inputs, **given)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.vw_loss, expected.vw_loss)
    with pytest.raises(ValueError, match="0 image placeholders"):
        model(inputs_embeds=torch.zeros(1, 4, 16), pixel_values=batch["pixel_values"][:1])


def test_the_image_token_is_the_one_id_beyond_the_vocabulary():
    embeddings = tiny_model(image_token_index=IMAGE_FAR_BEYOND).get_input_embeddings()
    assert embeddings.weight.shape[0] == VOCAB_SIZE and len(embeddings(torch.tensor([IMAGE_FAR_BEYOND])).unique()) == 1
    with pytest.raises(IndexError):
        embeddings(torch.tensor([VOCAB_SIZE]))


@PSEUDO
@pytest.mark.parametrize("tower", TOWERS)
def test_bfloat16(tower, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    expected = model(**batch)
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert out.vw_loss.dtype == out.loss.dtype == torch.float32
    assert_close(out.loss, expected.loss, rtol=0.1, atol=0)
    assert model.visual_words(batch["pixel_values"]).dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(out.loss, model).values())


def test_placeholders_are_no_labels():
    model = tiny_model()
    batch = tiny_batch(model.config)
    expected = model(**batch).lm_loss
    is_image = batch["input_ids"] == model.config.image_token_id
    batch["labels"] = torch.where(is_image, batch["input_ids"], batch["labels"])
    assert torch.equal(model(**batch).lm_loss, expected)


@pytest.mark.parametrize("tower", ["clip", "resnet"])
def test_float32_images_go_into_a_bfloat16_model(tower):
    model = tiny_model(tower=tower).to(torch.bfloat16)
    batch = tiny_batch(model.config)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.isfinite(model(**batch).logits).all()
    assert torch.isfinite(model.visual_words(batch["pixel_values"])).all()


def test_outputs_hold_numbers_alone():
    """Whoever compares outputs takes their differences, which masks have none of."""
    model = tiny_model()
    batch = without_labels(tiny_batch(model.config))
    for outputs in (model(**batch, use_cache=False), model.model(**batch, use_cache=False)):
        assert all(tensor.is_floating_point() for tensor in outputs.to_tuple())
