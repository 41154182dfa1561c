"""`vwlmm export`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlavaForConditionalGeneration

from helpers.adapters import train
from helpers.command_line import error_of
from helpers.conversations import tiny_processor
from helpers.tiny import IMAGE, tiny_batch, tiny_model, without_labels
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


# Refuses this package, as where it is not installed
LOAD = """
import sys
sys.modules["modeling_vwlmm"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, sum(weight.double().sum().item() for weight in model.state_dict().values()))
"""


def test_llava_computes_the_same(model_folder, tmp_path):
    main(["export", str(model_folder), str(tmp_path / "llava"), "--to", "llava"])
    model = VWLmmForCausalLM.from_pretrained(model_folder)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    batch = without_labels(tiny_batch(model.config))
    text = batch["input_ids"] != model.config.image_token_id
    vocab_size = model.config.text_config.vocab_size
    with torch.no_grad():
        found, expected = llava(**batch).logits[..., :vocab_size], model(**batch).logits
    torch.testing.assert_close(found[text], expected[text])


def test_remote_code_loads_without_this_package(model_folder, tmp_path):
    main(["export", str(model_folder), str(tmp_path / "remote"), "--to", "remote-code"])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "remote")], env=environment, capture_output=True, text=True
    )
    weights = VWLmmForCausalLM.from_pretrained(model_folder).state_dict().values()
    assert run.stdout.split() == ["VWLmmForCausalLM", str(sum(weight.double().sum().item() for weight in weights))]
    copy, own = tmp_path / "remote/model.safetensors", model_folder / "model.safetensors"
    assert load_file(copy).keys() == load_file(own).keys() and not os.path.samefile(copy, own)


@pytest.mark.parametrize("to, package", [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_graphs_generate_the_same(to, package, tmp_path):
    pytest.importorskip(package)
    from transformers.exporters import ExportedModel

    model = tiny_model(pseudo_image_features=True)
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "processor_config.json"
    code = {"auto_map": {"AutoProcessor": "evil.Evil"}}  # which is neither run nor written
    config.write_text(json.dumps({**json.loads(config.read_text()), **code}))
    main(["export", str(tmp_path / "model"), str(tmp_path / "graphs"), "--to", to])
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "graphs").glob("*.json"))
    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if to == "openvino" else {}
    graphs = ExportedModel.from_pretrained(tmp_path / "graphs").to(**options).runners

    batch = without_labels(tiny_batch(model.config, rows=((2, IMAGE, 3),)))
    image = graphs["image_encoder"](pixel_values=batch["pixel_values"])
    words = graphs["visual_words"](image_features=image["image_features"])["visual_words"]
    torch.testing.assert_close(words, model.visual_words(batch["pixel_values"]))
    is_image = batch["input_ids"] == model.config.image_token_id
    read = graphs["embed_tokens"](input_ids=batch["input_ids"].masked_fill(is_image, 0))["inputs_embeds"]
    read = read.masked_scatter(is_image[..., None], image["read_by_the_llm"])
    mask, llm = batch["attention_mask"], model.config.text_config
    cache = DynamicCache(config=llm)
    for layer in range(llm.num_hidden_layers):
        cache.update(*torch.zeros(2, 1, llm.num_key_value_heads, 0, llm.head_dim), layer)
    found = []
    for _ in range(6):
        output = graphs["language_model"](inputs_embeds=read, attention_mask=mask, past_key_values=cache)
        found.append(output["logits"][:, -1].argmax(-1))
        read = graphs["embed_tokens"](input_ids=found[-1][:, None])["inputs_embeds"]
        mask, cache = torch.cat([mask, mask.new_ones(1, 1)], 1), output["past_key_values"]
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, -6:]
    assert torch.equal(torch.cat(found), expected)


def test_what_cannot_be_exported_is_one_line(tmp_path, model_folder, capsys):
    train(tmp_path)
    for to, message in (("llava", "config.json"), ("remote-code", "is an adapter: vwlmm merge")):
        assert message in error_of(capsys, "export", str(tmp_path / "adapter"), str(tmp_path / "new"), "--to", to)
    tiny_model(pseudo_image_features=True).save_pretrained(tmp_path / "pif")
    said = error_of(capsys, "export", str(tmp_path / "pif"), str(tmp_path / "new"), "--to", "llava")
    assert "pseudo image features" in said
    assert "exists already" in error_of(capsys, "export", str(model_folder), str(tmp_path), "--to", "remote-code")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(model_folder), str(tmp_path / "new"), "--to", "remote-code", "--dtype", "float16"])
