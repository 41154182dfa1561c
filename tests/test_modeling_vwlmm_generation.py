"""Generation from images."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers.cases import IMAGE_TOKENS, PSEUDO, Calls
from helpers.tiny import (
    IMAGE,
    IMAGE_BEYOND,
    IMAGE_FAR_BEYOND,
    IMAGE_WITHIN,
    LLMS,
    ROWS,
    VOCAB_SIZE,
    llm_config,
    randomize,
    rows_of,
    tiny_batch,
    tiny_model,
    without_labels,
)


def greedy(model, inputs, steps, penalty=1.0):
    """Greedy decoding that computes everything anew for every token; the logits of each step and the tokens."""
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    step_logits = []
    for _ in range(steps):
        inputs = {**inputs, "input_ids": input_ids, "attention_mask": attention_mask}
        logits = model(**inputs, use_cache=False).logits[:, -1].clone()
        step_logits.append(logits.clone())
        for i, row in enumerate(input_ids):
            for token in set(row[attention_mask[i].bool()].tolist()) - {model.config.image_token_id}:
                logits[i, token] *= 1 / penalty if logits[i, token] > 0 else penalty
        tokens = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens)], dim=1)
    return torch.stack(step_logits), input_ids


@PSEUDO
@IMAGE_TOKENS
@torch.no_grad()
def test_generation_with_a_cache_equals_recomputation(image_token_index, pseudo):
    model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    step_logits, expected = greedy(model, inputs, 8)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    assert_close(torch.stack(out.logits), step_logits, rtol=1e-4, atol=1e-5)
    chunked = model.generate(**inputs, max_new_tokens=8, do_sample=False, prefill_chunk_size=3)
    assert chunked.tolist() == expected.tolist()


@pytest.mark.parametrize("llm", LLMS)
@torch.no_grad()
def test_generation_of_every_llm(llm):
    model = tiny_model(llm)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert found.tolist() == greedy(model, inputs, 4)[1].tolist()


@PSEUDO
@torch.no_grad()
def test_the_vm_head_runs_in_the_prefill_and_only_for_pseudo_image_features(pseudo):
    model = tiny_model(pseudo_image_features=pseudo)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    vm_head, lm_head = Calls(model.model.vm_head), Calls(model.lm_head)
    projector = Calls(model.model.multi_modal_projector)
    model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert lm_head.lengths == [1] * 5
    assert projector.lengths == [model.config.image_seq_length]
    assert vm_head.lengths == ([model.config.image_seq_length] if pseudo else [])


@pytest.mark.parametrize("image_token_index", [IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND])
@torch.no_grad()
def test_repetition_penalty_counts_text_tokens_alone(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    expected = greedy(model, inputs, 8, penalty=1.7)[1]
    assert expected.tolist() != greedy(model, inputs, 8)[1].tolist()
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)
    assert found.tolist() == expected.tolist()


def bigrams(tokens):
    return list(zip(tokens, tokens[1:], strict=False))


@pytest.mark.parametrize("image_token_index", [IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND])
@torch.no_grad()
def test_no_repeat_ngram_size(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 4)]))
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, 2]  # which a placeholder follows in the prompt
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, length:].tolist()
    assert len(set(bigrams(free))) < 19
    found = model.generate(**inputs, max_new_tokens=20, do_sample=False, no_repeat_ngram_size=2)[0, length:].tolist()
    assert len(set(bigrams(found))) == 19


@torch.no_grad()
def test_no_repeat_ngram_size_sees_no_ngram_in_placeholders():
    model = tiny_model()
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 2)]))
    text = inputs["input_ids"][inputs["input_ids"] != IMAGE_BEYOND].tolist()
    processors = model._get_logits_processor(GenerationConfig(no_repeat_ngram_size=2), input_ids_seq_length=9)
    for last in range(3, 90):
        input_ids = torch.cat([inputs["input_ids"], torch.tensor([[last]])], dim=1)
        banned = processors(input_ids, torch.zeros(1, VOCAB_SIZE))[0].isinf().nonzero().flatten().tolist()
        after = [b for a, b in bigrams(text[:3]) + bigrams([*text[3:], last]) if a == last]
        assert banned == sorted(after)


@PSEUDO
@torch.no_grad()
def test_beams_and_returned_sequences(pseudo):
    model = tiny_model(pseudo_image_features=pseudo)
    batch = tiny_batch(model.config, padding="left")
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
    }
    found = model.generate(**without_labels(batch), **settings)
    assert len(found) == 2 * len(ROWS)
    for i, row in enumerate(rows_of(model.config, batch)):
        expected = model.generate(**without_labels(row), **settings)
        assert found[2 * i : 2 * i + 2, -6:].tolist() == expected[:, -6:].tolist()
        assert expected[0].tolist() != expected[1].tolist()


@PSEUDO
@IMAGE_TOKENS
@torch.no_grad()
def test_generation_from_inputs_embeds(image_token_index, pseudo):
    model = tiny_model(image_token_index=image_token_index, pseudo_image_features=pseudo)
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 4)]))
    for settings in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        expected = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        del embeds["input_ids"]
        assert model.generate(**embeds, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("image_token_index", [IMAGE_WITHIN, IMAGE_BEYOND, IMAGE_FAR_BEYOND])
@torch.no_grad()
def test_what_generation_looks_up_by_the_ids_of_the_prompt(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 4)]))
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, 2]  # which a placeholder follows in the prompt
    settings = {"max_new_tokens": 12, "do_sample": False}
    free = model.generate(**inputs, **settings)
    text_model = randomize(AutoModelForCausalLM.from_config(llm_config()), seed=1)
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": text_model}):
        assert model.generate(**inputs, **settings, **assistance).tolist() == free.tolist()

    (prompt,) = inputs["input_ids"].tolist()
    processors = [
        model._get_logits_processor(
            GenerationConfig(encoder_no_repeat_ngram_size=2, encoder_repetition_penalty=penalty),
            input_ids_seq_length=len(prompt),
            encoder_input_ids=inputs["input_ids"],
        )
        for penalty in (None, 2.0)
    ]
    scores = torch.ones(1, VOCAB_SIZE)
    is_banned, is_rewarded = (process(inputs["input_ids"], scores)[0] for process in processors)
    assert is_banned.isinf().nonzero().flatten().tolist() == [t for t in [image_token_index] if t < VOCAB_SIZE]
    assert (is_rewarded == 2).nonzero().flatten().tolist() == sorted(set(prompt) - {image_token_index})


@IMAGE_TOKENS
@torch.no_grad()
def test_an_assistant_sees_the_images(image_token_index):
    model = tiny_model(image_token_index=image_token_index)
    inputs = without_labels(tiny_batch(model.config, [(3, IMAGE, 4)]))
    settings = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    lm_head, assistant = Calls(model.lm_head), tiny_model(image_token_index=image_token_index)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = model.generate(**inputs, **settings, assistant_model=assistant)
    # The same model proposes nothing wrong
    assert found.tolist() == expected.tolist() and lm_head.lengths == [9]


@torch.no_grad()
def test_sampling():
    model = tiny_model()
    inputs = without_labels(tiny_batch(model.config, padding="left"))
    found = model.generate(
        **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=20, top_p=0.9, min_p=0.01
    )
    assert found.shape == (3 * len(ROWS), inputs["input_ids"].shape[1] + 4)
    assert found[:, -4:].max() < VOCAB_SIZE
