"""Words through several lenses."""

import pytest
import torch

from helpers.conversations import picture, tiny_processor
from helpers.tiny import LLMS, tiny_model
from modeling_vwlmm.looking.lenses import lens_words
from modeling_vwlmm.processing import question_about


@pytest.mark.parametrize("llm", [LLMS[0], LLMS[-1]])
@pytest.mark.parametrize("pseudo", [False, True])
def test_each_lens_is_what_its_name_says(llm, pseudo, monkeypatch):
    monkeypatch.setattr("modeling_vwlmm.looking.lenses.ROWS", 3)
    model = tiny_model(llm, pseudo_image_features=pseudo)
    processor = tiny_processor(model.config)
    found = lens_words(model, processor, picture(0), k=5)
    layers = model.config.text_config.num_hidden_layers
    logit_lenses = [f"logit lens, layer {layer}" for layer in range(layers + 1)]
    assert list(found) == ["VM head", *logit_lenses, "nearest input embedding"]

    inputs = question_about(processor, [picture(0)], "")
    patches = inputs["input_ids"][0] == model.config.image_token_id
    states, llm_part = [], model.model.language_model
    handles = [llm_part.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [layer.register_forward_hook(lambda _, args, out: states.append(out)) for layer in llm_part.layers]
    with torch.no_grad():
        logits = model(**inputs).logits[0, patches]
        words = model.visual_words(inputs["pixel_values"])[0]
        read = states[0][0, patches]
        lens = [model.lm_head(llm_part.norm(state[0, patches])) for state in states]
        cosine = torch.cosine_similarity(read[:, None], model.get_input_embeddings().weight[None, :99], dim=-1)
    for handle in handles:
        handle.remove()
    assert torch.equal(lens[-1], logits)
    for scores, top in zip([words, *lens, cosine], found.values(), strict=True):
        assert scores[:, :99].topk(5, dim=-1).indices.tolist() == top.tolist()


def test_an_llm_without_a_last_norm(monkeypatch):
    model = tiny_model()
    del model.model.language_model.norm
    with pytest.raises(ValueError, match="LlamaModel has no `norm`"):
        lens_words(model, tiny_processor(model.config), picture(0))
