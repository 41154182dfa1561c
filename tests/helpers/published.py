"""Checkpoints in the layout of the published VW-LMM models. Of three, what the authors' code computes is stored."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from helpers import ROOT
from modeling_vwlmm.naive import naive_divergence


PUBLISHED = ROOT / "tests" / "fixtures" / "published"
VARIANTS = ["vicuna", "mistral", "vicuna-pif"]
IMAGE = -200  # in published input ids, once an image
LLMS = {
    "vwLlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "vwPifLlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "vwMistralForCausalLM": (MistralConfig, MistralForCausalLM),
    "LlavaLlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "LlavaMistralForCausalLM": (MistralConfig, MistralForCausalLM),
}


def expected(variant):
    """The figures and the tensors that the published code gave."""
    folder = PUBLISHED / variant
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


def expand(rows, config, fill=0):
    """Rows of ids with `IMAGE` once an image, as our model reads them: padded on the right with `fill`."""
    expanded = [
        [token for t in row for token in ([config.image_token_id] * config.image_seq_length if t == IMAGE else [t])]
        for row in rows
    ]
    longest = max(map(len, expanded))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in expanded])


def write_published(folder, architecture="vwLlamaForCausalLM", seed=0, dtype=torch.float32, shards=1,
                    suffix="safetensors", vm_head=True, tower_weights=True, image_size=28, layers=2, hidden=24,
                    heads=4, kv_heads=2, width=16, raw=()):  # fmt: skip
    """A random checkpoint in the published layout; returns its tensors by their published names."""
    torch.manual_seed(seed)
    llm_config, llm_class = LLMS[architecture]
    text = dict(vocab_size=300, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5)  # fmt: skip
    llm = llm_class(llm_config(**text))
    tower_config = CLIPVisionConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                                    num_attention_heads=4, image_size=image_size, patch_size=14)  # fmt: skip
    tower = CLIPVisionModel(tower_config)
    parts = {
        "": llm,
        "model.mm_projector.": nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)),
        "model.vision_tower.vision_tower.vision_model.": tower,
    }
    if vm_head:
        parts["vm_head."] = nn.Linear(hidden, 300, bias=False)
    tensors = {
        f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()
    }
    for name, tensor in tensors.items():
        tensors[name] = (torch.randn_like(tensor) * (0.3 if tensor.dim() > 1 else 0.1) + (tensor.dim() == 1)).to(dtype)

    folder.mkdir()
    tower_folder = folder.parent / f"{folder.name}-tower"
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    tower.save_pretrained(tower_folder)
    source = PUBLISHED / ("mistral" if "Mistral" in architecture else "vicuna")
    shutil.copy(source / "vision_tower" / "preprocessor_config.json", tower_folder)
    config = json.loads((source / "checkpoint" / "config.json").read_text())
    config.update(text, architectures=[architecture], mm_vision_tower=str(tower_folder), mm_hidden_size=width)
    config.update(raw)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(source / "checkpoint" / file, folder)
    stored = {name: tensors[name] for name in tensors if tower_weights or "vision_tower" not in name}
    write_shards(folder, stored, shards, suffix)
    return tensors


def write_shards(folder, tensors, shards=1, suffix="safetensors"):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        shard = {name: tensors[name].contiguous() for name in names[i::shards]}
        weight_map.update(dict.fromkeys(shard, file))
        save_file(shard, folder / file) if suffix == "safetensors" else torch.save(shard, folder / file)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reference(folder, tensors, input_ids, pixel_values, labels):
    """Logits and losses of a batch without padding, from stock classes and formulas, in float64.

    Args: `input_ids` and `labels` are expanded, with `IMAGE` at every patch.
    """
    raw = json.loads((folder / "config.json").read_text())
    (architecture,) = raw["architectures"]
    llm_config, llm_class = LLMS[architecture]
    text = {name: raw[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")}  # fmt: skip
    llm = llm_class(llm_config(**text, rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]}))
    llm.load_state_dict(
        {n: t for n, t in tensors.items() if n.startswith(("model.embed", "model.layers", "model.norm", "lm_"))}
    )
    tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(raw["mm_vision_tower"]))
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    llm, tower = llm.double().eval(), tower.double().eval()
    w = {name: tensor.double() for name, tensor in tensors.items()}
    features = tower(pixel_values.double(), output_hidden_states=True).hidden_states[-2][:, 1:]
    hidden = nn.functional.gelu(features @ w["model.mm_projector.0.weight"].T + w["model.mm_projector.0.bias"])
    features = (hidden @ w["model.mm_projector.2.weight"].T + w["model.mm_projector.2.bias"]).flatten(0, 1)
    visual_word_logits = features @ w["vm_head.weight"].T
    is_image = input_ids == IMAGE
    embeddings = llm.get_input_embeddings().weight
    inputs_embeds = embeddings[input_ids.masked_fill(is_image, 0)]
    inputs_embeds[is_image] = visual_word_logits.softmax(-1) @ embeddings if "Pif" in architecture else features
    logits = llm(inputs_embeds=inputs_embeds).logits
    lm_loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    scored = (torch.arange(input_ids.shape[1]) > 0).expand_as(is_image)[is_image]
    pairs = logits[:, :-1][is_image[:, 1:]], visual_word_logits[scored]
    divergences = {name: naive_divergence(*pairs, name) / scored.sum() for name in ("visual_words", "language_model")}
    return {"logits": logits, "lm_loss": lm_loss, **divergences}
