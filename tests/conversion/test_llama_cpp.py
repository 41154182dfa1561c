"""VW-LMM for llama.cpp: what its mmproj holds, against a graph like llama.cpp's, and what is refused."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.command_line import error_of
from helpers.conversations import tiny_processor
from helpers.tiny import tiny_batch, tiny_model
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


# Stands for llama.cpp's, which is no package: copies what it was given
CONVERTER = """
import shutil, sys
llm, option, output, option2, output_type = sys.argv[1:]
assert (option, option2, output_type) == ("--outfile", "--outtype", "f32")
shutil.copytree(llm, {kept!r})
open(output, "wb").write(b"GGUF")
"""
FAILING = 'raise SystemExit("BPE pre-tokenizer was not recognized")'


def save(model, folder):
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)


def mmproj_features(path, pixel_values):
    """What llama.cpp computes of pixels, in torch, from the file alone. The class embedding comes first."""
    reader = GGUFReader(path)
    field = {name: field.contents() for name, field in reader.fields.items()}
    weight = {tensor.name: torch.from_numpy(np.array(tensor.data)).float() for tensor in reader.tensors}
    # Its gelu is the one with tanh, as SigLIP's is
    act = partial(F.gelu, approximate="tanh") if field["clip.use_gelu"] else lambda x: x * torch.sigmoid(1.702 * x)
    eps, heads = field["clip.vision.attention.layer_norm_epsilon"], field["clip.vision.attention.head_count"]

    def linear(name, x):
        return F.linear(x, weight[f"{name}.weight"], weight[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weight[f"{name}.weight"], weight[f"{name}.bias"], eps)

    x = F.conv2d(
        pixel_values, weight["v.patch_embd.weight"], weight.get("v.patch_embd.bias"), field["clip.vision.patch_size"]
    )
    x = x.flatten(2).transpose(1, 2)
    has_class = "v.class_embd" in weight
    if has_class:
        x = torch.cat([weight["v.class_embd"].expand(len(x), 1, -1), x], 1)
    x = x + weight["v.position_embd.weight"]
    x = norm("v.pre_ln", x) if "v.pre_ln.weight" in weight else x
    states = [x]
    for layer in range(field["clip.vision.block_count"]):
        name = f"v.blk.{layer}"
        y = norm(f"{name}.ln1", x)
        q, k, v = (linear(f"{name}.attn_{part}", y).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        x = x + linear(f"{name}.attn_out", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + linear(f"{name}.ffn_down", act(linear(f"{name}.ffn_up", norm(f"{name}.ln2", x))))
        states.append(x)
    x = torch.cat([states[layer] for layer in field["clip.vision.feature_layer"]], -1)[:, int(has_class) :]
    return linear("mm.2", F.gelu(linear("mm.0", x)))


@pytest.mark.parametrize(
    "tower, config", [("clip", {}), ("clip", {"vision_feature_layer": [-3, -1]}), ("siglip", {})], ids=str
)
def test_files_compute_what_the_model_does(tmp_path, tower, config):
    model = tiny_model(tower=tower, **config)
    with torch.no_grad():  # float16 holds the convolution
        convolution = model.model.vision_tower.embeddings.patch_embedding.weight
        convolution.copy_(convolution.half())
    save(model, tmp_path / "ours")
    (tmp_path / "convert.py").write_text(CONVERTER.format(kept=str(tmp_path / "llm")))
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf"]
    main([*command, "--converter", str(tmp_path / "convert.py"), "--dtype", "float32"])
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["mmproj.gguf", "model.gguf"]
    pixel_values = tiny_batch(model.config)["pixel_values"]
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values).pooler_output
    found = mmproj_features(tmp_path / "gguf" / "mmproj.gguf", pixel_values)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = torch.tensor([[5, 6, 7]])
    vocab_size = model.config.text_config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(llm(ids).logits[..., :vocab_size], model(ids).logits)
    # llama.cpp wants a row for every token, the image token's among them
    assert llm.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "llm"))


def test_half_precision_is_the_default(tmp_path):
    save(tiny_model().bfloat16(), tmp_path / "ours")
    (tmp_path / "convert.py").write_text(CONVERTER.format(kept=str(tmp_path / "llm")).replace('"f32"', '"auto"'))
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf"]
    main([*command, "--converter", str(tmp_path / "convert.py")])
    assert VWLmmForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    types = {tensor.name: tensor.data.dtype for tensor in GGUFReader(tmp_path / "gguf" / "mmproj.gguf").tensors}
    assert types["mm.0.weight"] == types["v.blk.0.attn_q.weight"] == types["v.patch_embd.weight"] == np.float16
    assert types["mm.0.bias"] == types["v.position_embd.weight"] == types["v.class_embd"] == np.float32


@pytest.mark.parametrize(
    "model, message",
    [
        ({"tower": "resnet"}, "a tower of type resnet"),
        ({"pseudo_image_features": True}, "pseudo image features"),
        ({"vision_feature_layer": [-1, -2]}, "in ascending order"),
        ({"tower": "siglip", "vision_feature_select_strategy": "default"}, "leaves out"),
        ({"projector_hidden_act": "relu"}, "a projector with relu"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, capsys, model, message):
    save(tiny_model(**model), tmp_path / "ours")
    command = ("export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf", "--converter", sys.executable)
    assert message in error_of(capsys, *command)
    assert not (tmp_path / "gguf").exists()


def test_what_the_converter_says_is_passed_on(tmp_path, capsys):
    save(tiny_model(), tmp_path / "ours")
    command = ("export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf")
    assert "--converter" in error_of(capsys, *command)
    assert "no such file" in error_of(capsys, *command, "--converter", str(tmp_path / "convert.py"))
    (tmp_path / "convert.py").write_text(FAILING)
    with pytest.raises(SystemExit):
        main([*command, "--converter", str(tmp_path / "convert.py")])
    assert "convert.py did not convert the LLM: BPE pre-tokenizer was not recog" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


@pytest.mark.parametrize(
    "writes, said",
    [
        ("pass", "no message"),
        ("open(output, 'w').close(); print('done')", "done"),
        ("os.mkdir(output)", "no message"),
        ("sys.stderr.buffer.write(b'\\xff bad'); sys.exit(1)", "\ufffd bad"),
        ("sys.exit('\\x1b[31m' + 'z' * 2**20)", "[31m" + "z" * 495 + "\n"),
    ],
)
def test_a_converter_that_makes_no_file_has_one_line_of_text(tmp_path, capsys, writes, said):
    save(tiny_model(), tmp_path / "ours")
    (tmp_path / "convert.py").write_text(f"import os, sys\noutput = sys.argv[3]\n{writes}")
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf"]
    with pytest.raises(SystemExit):
        main([*command, "--converter", str(tmp_path / "convert.py")])
    assert f"convert.py did not convert the LLM: {said}" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


def test_an_export_that_is_ended_leaves_nothing(tmp_path):
    """The converter tells its parent to end, and says so only if it lives on."""
    save(tiny_model(), tmp_path / "ours")
    late = tmp_path / "late"
    (tmp_path / "convert.py").write_text(
        "import os, pathlib, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\n"
        f"time.sleep(1)\npathlib.Path({str(late)!r}).touch()\ntime.sleep(60)"
    )
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--converter", str(tmp_path / "convert.py")])
    assert ended.value.code == 143 and not late.exists()
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []
