"""`vwlmm generate`."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from helpers.command_line import CPU, error_of, recipe_of
from helpers.conversations import picture, tiny_processor
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


def test_weights_that_disagree_with_the_config_are_one_line_and_status_2(tmp_path, capsys, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (model_folder / "config.json").write_text(json.dumps(config))
    picture(0).save(tmp_path / "a.png")
    message = error_of(capsys, "generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5")
    assert "of another shape than the config says" in message and "mlp.up_proj.weight" in message


def test_generate_prints_what_the_model_generates(tmp_path, capsys, model_folder):
    picture(0).save(tmp_path / "a.png")
    main(["generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w20 w21", "--max-new-tokens", "4"])
    model = VWLmmForCausalLM.from_pretrained(model_folder).eval()
    processor = tiny_processor(model.config)
    inputs = processor(images=picture(0), text="<s><image> w20 w21 w97", add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.split() == processor.tokenizer.decode(expected, skip_special_tokens=True).split()


def test_shards_outside_of_the_folder_are_not_read(tmp_path, capsys, model_folder, data):
    adapter = tmp_path / "adapter"
    get_peft_model(
        VWLmmForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(adapter)
    picture(0).save(tmp_path / "a.png")
    (model_folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    names = load_file(tmp_path / "weights.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../weights.safetensors")}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    train = [
        "train",
        "--model",
        str(model_folder),
        "--dataset",
        str(data),
        "--image_folder",
        str(data.parent / "images"),
    ]
    for call in (
        ["generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5"],
        [*train, "--output_dir", str(tmp_path / "out"), *CPU],
        ["merge", str(adapter), str(tmp_path / "merged")],
    ):
        assert "../weights.safetensors: no such shard" in error_of(capsys, *call), call[0]


@pytest.mark.parametrize(
    "file, field, value, expected",
    [
        (
            "config.json",
            "vision_config.image_size",
            "[1]",
            "a whole number below 100,000,000, a list or a mapping of them",
        ),
        ("config.json", "text_config.rope_parameters.rope_type", [], "a text"),
        ("config.json", "model_type", [], "a text"),
        ("config.json", "dtype", "none9", "the name of a floating-point dtype of torch"),
        ("config.json", "dtype", 7, "the name of a floating-point dtype of torch"),
        ("processor_config.json", "patch_size", "x", "a whole number below 100,000,000, a list or a mapping of them"),
        (
            *("processor_config.json", "image_processor.size", {"shortest_edge": 10**12}),
            "a whole number below 100,000,000, a list or a mapping of them",
        ),
        ("processor_config.json", "num_additional_image_tokens", "q", "a whole number"),
        ("processor_config.json", "num_additional_image_tokens", None, "a whole number"),
        ("processor_config.json", "image_processor.image_mean", "x", "a number or a list of them"),
        ("processor_config.json", "image_processor.image_std", "x", "a number or a list of them"),
        ("generation_config.json", "pad_token_id", "NaN", "a whole number"),
        ("processor_config.json", "image_processor.image_processor_type", 0, "a text"),
        ("tokenizer_config.json", "tokenizer_class", 2, "a text"),
        ("generation_config.json", "max_new_tokens", "x", "a whole number"),
    ],
)
def test_fields_of_wrong_types_are_named_with_their_file(tmp_path, capsys, model_folder, file, field, value, expected):
    path = model_folder / file
    content = fields = json.loads(path.read_text()) if path.exists() else {}
    *parents, name = field.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    fields[name] = value
    path.write_text(json.dumps(content))
    picture(0).save(tmp_path / "a.png")
    message = error_of(capsys, "generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5")
    assert message == f"vwlmm generate: {path}: {field} is {json.dumps(value)}, expected {expected}"


@pytest.mark.parametrize("mean", [-1, 0.5, [0.5, 10**6, 0.5]])
def test_a_processor_that_pads_with_no_colour_is_named(tmp_path, capsys, model_folder, mean):
    path = model_folder / "processor_config.json"
    fields = json.loads(path.read_text())
    fields["image_processor"]["image_mean"] = mean
    path.write_text(json.dumps(fields))
    picture(0).save(tmp_path / "a.png")
    said = error_of(capsys, "generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5")
    assert "pads with its image_mean" in said and said.endswith("expected a list of numbers from 0 to 1")


def test_a_processor_that_counts_no_patches_is_named(tmp_path, capsys, model_folder, data):
    path = model_folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": None}))
    picture(0).save(tmp_path / "a.png")
    for call in (
        ("generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5"),
        ("train", "--config", recipe_of(tmp_path, model_folder, data), *CPU),
    ):
        assert "the processor has no patch_size" in error_of(capsys, *call)


def test_special_tokens_without_a_row_are_named(tmp_path, capsys, model_folder, data):
    path = model_folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    picture(0).save(tmp_path / "a.png")
    path.write_text(json.dumps({**fields, "eos_token": "</sU"}))
    expected = "the tokenizer's eos_token </sU is token 100, but the LLM's vocabulary ends at 98"
    generate = ("generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5")
    assert expected in error_of(capsys, *generate)
    assert expected in error_of(capsys, "train", "--config", recipe_of(tmp_path, model_folder, data), *CPU)
    path.write_text(json.dumps(fields))
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    next(token for token in tokenizer["added_tokens"] if token["content"] == "<image>")["content"] = "x"
    (model_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "but the config's image_token_id is 99" in error_of(capsys, *generate)
