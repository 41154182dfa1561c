"""LLaVA becomes VW-LMM, VW-LMM becomes LLaVA."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from helpers.conversations import picture
from helpers.conversion import convert, write_llava
from helpers.published import write_published
from helpers.tiny import IMAGE_FAR_BEYOND, IMAGE_WITHIN, LLMS, VOCAB_SIZE, tiny_batch, tiny_model, without_labels
from modeling_vwlmm.cli import main
from modeling_vwlmm.conversion.published import published_name


def llava_inputs(llava, folder):
    processor = AutoProcessor.from_pretrained(folder)
    text = ["<image> w5 w6 w7", "w8 <image> w9 w10"]
    return processor(images=[picture(0), picture(1)], text=text, padding=True, return_tensors="pt")


def assert_same_weights(ours, llava):
    found, wanted = ours.state_dict(), llava.state_dict()
    assert found.keys() - wanted.keys() == {"model.vm_head.weight"} and wanted.keys() <= found.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("names", ["saved", "new", "old"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("llm", LLMS)
def test_llava_of_transformers_there_and_back(tmp_path, llm, tower, names):
    llava = write_llava(tmp_path / "llava", llm, tower)
    path = tmp_path / "llava" / "model.safetensors"
    saved = load_file(path)
    assert any(name.startswith("language_model.model.") for name in saved)  # as before transformers 4.52
    if names == "old":
        saved = {name.replace("vision_tower.", "vision_tower.vision_model."): saved[name] for name in saved}
    elif names == "new":
        saved = {
            name: tensor for name, tensor in llava.state_dict().items() if name not in llava.all_tied_weights_keys
        }
    save_file(saved, path, metadata={"format": "pt"})
    ours, processor = convert(tmp_path / "llava", tmp_path / "ours")
    assert_same_weights(ours, llava)
    inputs = llava_inputs(llava, tmp_path / "ours")
    assert inputs["input_ids"].equal(llava_inputs(llava, tmp_path / "llava")["input_ids"])
    assert torch.equal(ours(**inputs).logits, llava(**inputs).logits)
    # The image token stood for no text, and is the last one
    assert ours.config.visual_vocab_size == ours.model.vm_head.out_features == IMAGE_WITHIN
    main(["convert", "--to", "llava", str(tmp_path / "ours"), str(tmp_path / "back")])
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(**inputs).logits, llava(**inputs).logits)
    assert type(AutoProcessor.from_pretrained(tmp_path / "back")) is LlavaProcessor


def test_the_first_llava_checkpoints_of_transformers(tmp_path):
    """Their processor does not say how many placeholders an image takes, and their config little of the models."""
    llava = write_llava(tmp_path / "llava")
    inputs = llava_inputs(llava, tmp_path / "llava")
    path = tmp_path / "llava" / "processor_config.json"
    raw = json.loads(path.read_text())
    pixels = raw.pop("image_processor")
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        raw.pop(name)
    path.write_text(json.dumps(raw))
    (tmp_path / "llava" / "preprocessor_config.json").write_text(json.dumps(pixels))
    _, processor = convert(tmp_path / "llava", tmp_path / "ours")
    assert inputs["input_ids"].equal(llava_inputs(llava, tmp_path / "ours")["input_ids"])


def test_back_to_llava_with_an_image_token_beyond_the_vocabulary(tmp_path):
    model = tiny_model(image_token_index=IMAGE_FAR_BEYOND)
    model.save_pretrained(tmp_path / "ours")
    main(["convert", "--to", "llava", str(tmp_path / "ours"), str(tmp_path / "llava")])
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    batch = without_labels(tiny_batch(model.config))
    logits, wanted = llava(**batch).logits, model(**batch).logits
    assert torch.equal(logits[..., :VOCAB_SIZE], wanted) and logits.shape[-1] == IMAGE_FAR_BEYOND + 1
    # The mean of all is never above the largest of them
    assert (logits[..., VOCAB_SIZE:].amax(-1) <= wanted.amax(-1)).all()


@pytest.mark.parametrize(
    "model, message",
    [
        ({"pseudo_image_features": True}, "reads pseudo image features"),
        ({"tower": "resnet"}, "takes no tower of type resnet"),
    ],
)
def test_what_llava_has_no_place_for(tmp_path, capsys, model, message):
    tiny_model(**model).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        main(["convert", "--to", "llava", str(tmp_path / "ours"), str(tmp_path / "llava")])
    assert message in capsys.readouterr().err and not (tmp_path / "llava").exists()


@pytest.mark.parametrize("tower_weights", [True, False])
@pytest.mark.parametrize("architecture", ["LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"])
def test_original_llava(tmp_path, architecture, tower_weights):
    raw = {"model_type": "llava_llama", "mm_use_im_start_end": False}
    wanted = write_published(tmp_path / "source", architecture, vm_head=False, tower_weights=tower_weights, raw=raw)
    ours, processor = convert(tmp_path / "source", tmp_path / "ours")
    found = ours.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(found.pop(published_name(name)), tensor), name
    assert found.keys() == {"model.vm_head.weight"}
    assert ("[INST]" if "Mistral" in architecture else "ASSISTANT: ") in processor.chat_template
    std = found["model.vm_head.weight"].std().item()
    assert std == pytest.approx(ours.config.text_config.initializer_range, rel=0.1)
