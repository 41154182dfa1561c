"""The trainer: TRL's with the visual-word loss, in the four stages."""

from pathlib import Path

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from PIL import Image
from tiny import IMAGE_WITHIN, randomize, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from modeling_vwlmm import VWLmmForCausalLM, modeling_vwlmm
from modeling_vwlmm.data import read_chat_template
from modeling_vwlmm.processing import make_processor
from modeling_vwlmm.trainer import PARTS, STAGES, VWLmmSFTConfig, VWLmmSFTTrainer
from modeling_vwlmm.visual_word_loss import visual_word_loss


ANSWERS = ["w5 w6", "w7", "w8 w9 w10 w11 w12", "w13 w14 w15"]
# Says who speaks, and marks nothing
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% else %} w97 "
    "{{ message.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} w97{% endif %}"
)

IMAGES = datasets.List(datasets.Image())


def tiny_processor(config, template=PLAIN_TEMPLATE):
    """A processor whose token w{i} has the id i, and whose image token is the config's."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, config.image_token_id)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return make_processor(config, tokenizer, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def picture(seed, size=(20, 16)):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def conversations(images=(1, 0, 2, 1)):
    """Samples of unequal length with one image, none and two."""
    rows = []
    for i, (count, answer) in enumerate(zip(images, ANSWERS, strict=True)):
        messages = [{"role": "user", "content": f"w20 w{21 + i}"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [picture(10 * i + k) for k in range(count)], "messages": (1 + i % 2) * messages})
    return datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            }
        ),
    )


def sft_config(tmp_path, kind=VWLmmSFTConfig, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**{**defaults, **kwargs})


def trainer_of(tmp_path, model=None, dataset=None, template=PLAIN_TEMPLATE, **kwargs):
    model = model or tiny_model()
    return VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, **kwargs),
        train_dataset=conversations() if dataset is None else dataset,
        processing_class=tiny_processor(model.config, template),
    )


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def first_gradients(trainer):
    """The gradients of the first optimizer step, all micro-batches of it."""
    found = {}

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            control.should_training_stop = True

    trainer.add_callback(Record())
    trainer.train()
    return found


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda text: f"{name}: {text}", **tolerance)  # noqa: B023


@pytest.mark.parametrize("stage", STAGES)
def test_stage_trains_its_parts_and_no_others(tmp_path, stage):
    model = tiny_model(tower="resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer_of(tmp_path, model, stage=stage).train()
    trained = tuple(name for part in STAGES[stage]["trainable"] for name in PARTS[part])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(trained), name


def test_the_weight_of_the_visual_word_loss_changes_the_gradients(tmp_path):
    gradients = {
        weight: first_gradients(trainer_of(tmp_path, visual_word_loss_weight=weight, max_grad_norm=0))
        for weight in (0.0, 1.0, 2.0)
    }
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    added = gradients[1.0][name] - gradients[0.0][name]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(gradients[2.0][name] - gradients[0.0][name], 2 * added, atol=1e-6, rtol=1e-4)
    assert "model.vm_head.weight" in gradients[1.0] and "model.vm_head.weight" not in gradients[0.0]


def test_gradients_are_those_of_the_models_own_loss(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, max_grad_norm=0)
    batch = batch_of(trainer)
    model.train()
    outputs = model(**{name: tensor.clone() for name, tensor in batch.items()})
    outputs.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert_same(first_gradients(trainer), expected, atol=1e-6, rtol=1e-4)


def test_weight_0_is_trls_own_llava_training_step_by_step(tmp_path):
    model = tiny_model(image_token_index=IMAGE_WITHIN, visual_word_loss_weight=0.0)
    config = model.config
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=IMAGE_WITHIN,
            image_seq_length=config.image_seq_length,
        )
    )
    stock.load_state_dict({k: v.clone() for k, v in model.state_dict().items() if "vm_head" not in k})
    rows = [
        {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:2]}
        for row in conversations(images=(1, 1, 2, 1))
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    arguments = {"per_device_train_batch_size": 2, "max_steps": 6, "seed": 3, "trainable": None}
    ours = VWLmmSFTTrainer(
        model, sft_config(tmp_path, **arguments), train_dataset=dataset, processing_class=tiny_processor(config)
    )
    arguments.pop("trainable")
    trls = SFTTrainer(
        stock,
        sft_config(tmp_path, SFTConfig, **arguments),
        train_dataset=dataset,
        processing_class=tiny_processor(config),
    )
    ours.train()
    trls.train()
    for our_log, their_log in zip(ours.state.log_history[:-1], trls.state.log_history[:-1], strict=True):
        # TRL takes the head of every position where there is no Triton, we of the labelled ones: sums in another order
        assert {name: value for name, value in our_log.items() if name in their_log} == pytest.approx(their_log, 1e-5)
        assert our_log["lm_loss"] == pytest.approx(our_log["loss"]) and our_log["vw_loss"] == 0
    theirs = stock.state_dict()
    assert_same(
        {name: tensor for name, tensor in model.state_dict().items() if name in theirs}, theirs, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_four_accumulated_steps_of_one_are_a_batch_of_four(tmp_path, target):
    def run(batch_size, steps):
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            visual_word_target=target,
            max_grad_norm=0,
        )
        gradients = first_gradients(trainer)
        return gradients, trainer

    accumulated, first = run(1, 4)
    whole, second = run(4, 1)
    assert_same(accumulated, whole, atol=1e-6, rtol=1e-4)
    logs = [trainer.state.log_history[0] for trainer in (first, second)]
    for name in ("loss", "lm_loss", "vw_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5) and logs[0][name] > 0
    assert logs[0]["loss"] == pytest.approx(logs[0]["lm_loss"] + logs[0]["vw_loss"], rel=1e-5)


def test_log_lines_and_evaluation_have_both_losses(tmp_path):
    model = tiny_model(visual_word_loss_weight=0.5)
    trainer = VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
        train_dataset=conversations(),
        eval_dataset=conversations(),
        processing_class=tiny_processor(model.config),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == len(evaluations) == 3
    for log in logs:
        assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["vw_loss"], rel=1e-4)
    for log in evaluations:
        assert log["eval_loss"] == pytest.approx(log["eval_lm_loss"] + 0.5 * log["eval_vw_loss"], rel=1e-4)
    with torch.no_grad():
        outputs = model.eval()(**batch_of(trainer))
    assert evaluations[-1]["eval_vw_loss"] == pytest.approx(outputs.vw_loss.item(), rel=1e-4)
    assert evaluations[-1]["eval_lm_loss"] == pytest.approx(outputs.lm_loss.item(), rel=1e-4)


def test_full_length_logits_are_not_built(tmp_path, monkeypatch):
    """TRL's head gets the positions before a label, ours the scored image positions."""
    model, rows = tiny_model(), []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction, "apply", lambda *args: rows.append(len(args[0])) or apply(*args)
    )
    monkeypatch.setattr(
        modeling_vwlmm, "visual_word_loss", lambda *args, **kwargs: rows.append(len(args[0])) or loss(*args, **kwargs)
    )
    loss = visual_word_loss
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head was called"))
    trainer = trainer_of(tmp_path, model, max_steps=1)
    labels = (batch_of(trainer)["labels"][:, 1:] >= 0).sum()
    trainer.train()
    assert rows == [labels, 4 * model.config.image_seq_length]  # of the batch's four images


def test_a_frozen_tower_builds_no_graph(tmp_path):
    """Not even under activation checkpointing, for which TRL has all embeddings ask for gradients."""
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, stage="joint", activation_checkpointing=True)
    graphs = []
    model.model.vision_tower.register_forward_hook(
        lambda module, inputs, outputs: graphs.append(outputs.last_hidden_state.requires_grad)
    )
    first_gradients(trainer)
    assert graphs == [False]


def test_vm_head_training_runs_the_lmm_without_a_graph(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, stage="visual_words")
    needed_graph = []
    model.model.register_forward_hook(
        lambda module, inputs, outputs: needed_graph.append(outputs.last_hidden_state.requires_grad)
    )
    assert first_gradients(trainer).keys() == {"model.vm_head.weight"}
    assert needed_graph == [False]


def test_checkpoints_load_with_their_processor(tmp_path):
    model = tiny_model()
    trainer = trainer_of(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = VWLmmForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2")
    batch = {"images": picture(0), "text": "w5 <image> w6", "return_tensors": "pt"}
    for name, tensor in tiny_processor(model.config)(**batch).items():
        assert torch.equal(processor(**batch)[name], tensor)


def test_a_model_may_be_given_by_name(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    trainer = VWLmmSFTTrainer(str(tmp_path / "model"), sft_config(tmp_path / "run"), train_dataset=conversations())
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0


def labelled_text(trainer):
    batch = batch_of(trainer)
    assert not (batch["labels"] == trainer.model.config.image_token_id).any()
    assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100)).all()
    tokenizer = trainer.processing_class.tokenizer
    return sorted(tokenizer.decode(labels[labels != -100]) for labels in batch["labels"])


MARKED_TEMPLATE = PLAIN_TEMPLATE.replace(
    "{{ message.content[0].text }}{{ eos_token }}",
    "{% generation %}{{ message.content[0].text }}{{ eos_token }}{% endgeneration %}",
)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE, read_chat_template("vicuna_v1")])
def test_labels_are_the_assistant_turns(tmp_path, template):
    said = [f"{answer}</s>" for answer in ANSWERS]
    expected = sorted([said[0], 2 * said[1], said[2], 2 * said[3]])
    found = labelled_text(trainer_of(tmp_path, template=template.replace("</s>", " </s> ")))
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in expected]


def test_all_text_is_labelled_without_assistant_only_loss(tmp_path):
    assert all(text.startswith("<s>") for text in labelled_text(trainer_of(tmp_path, assistant_only_loss=False)))


def test_text_without_an_image_column_trains(tmp_path):
    dataset = conversations().remove_columns("images")
    trainer = trainer_of(tmp_path, dataset=dataset)
    trainer.train()
    assert trainer.state.log_history[0]["lm_loss"] > 0 and trainer.state.log_history[0]["vw_loss"] == 0


def test_images_that_do_not_fit_are_an_error_and_text_is_cut(tmp_path):
    trainer = trainer_of(tmp_path, max_length=8)  # the sample of two images needs 1 + 2 * 4
    with pytest.raises(
        ValueError, match=r"sample 2 has 18 tokens, 8 of them image placeholders that end at token 9: .* max_length 8"
    ):
        batch_of(trainer)
    assert batch_of(trainer_of(tmp_path, max_length=9))["input_ids"].shape == (4, 9)


def test_bad_batches_are_named(tmp_path):
    nobody_answers = conversations().map(lambda row: {"messages": row["messages"][:1]})
    with pytest.raises(ValueError, match=r"no token of the batch is a label.*sample 0"):
        batch_of(trainer_of(tmp_path, dataset=nobody_answers))


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    template = PLAIN_TEMPLATE.replace("w97 {{ message", "w97 {% if loop.last %}w96 {% endif %}{{ message")
    with pytest.raises(ValueError, match="mark it with {% generation %}"):
        batch_of(trainer_of(tmp_path, template=template))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="trainable is .*expected one or more of vision_tower"):
        sft_config(tmp_path, trainable=["head"])
    with pytest.raises(ValueError, match='stage is "stage5", expected one of align'):
        sft_config(tmp_path, stage="stage5")
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="visual_word_loss_weight is .*, expected 0 or more"):
            sft_config(tmp_path, visual_word_loss_weight=weight)
    with pytest.raises(ValueError, match='visual_word_target is "words"'):
        sft_config(tmp_path, visual_word_target="words")
    with pytest.raises(ValueError, match="label_smoothing_factor and .* leave the visual-word loss out"):
        trainer_of(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TypeError, match="VWLmmSFTConfig"):
        VWLmmSFTTrainer(tiny_model(), sft_config(tmp_path, SFTConfig), train_dataset=conversations())
    llava = randomize(LlavaForConditionalGeneration(LlavaConfig(**tiny_config().to_dict() | {"model_type": "llava"})))
    with pytest.raises(TypeError, match="must be a VWLmmForCausalLM, got a LlavaForConditionalGeneration"):
        VWLmmSFTTrainer(llava, sft_config(tmp_path), train_dataset=conversations())


TRLS_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5"])
def test_an_llms_own_template_takes_images_and_labels_every_turn(tmp_path, name):
    template = (TRLS_TEMPLATES / f"{name}.jinja").read_text()
    trainer = trainer_of(tmp_path, template=template)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w6"}]},
    ]
    text = trainer.processing_class.apply_chat_template(messages)
    plain = [{"role": "user", "content": "<image>\nw5"}, {"role": "assistant", "content": "w6"}]
    assert text == trainer.processing_class.tokenizer.apply_chat_template(
        plain, chat_template=template, tokenize=False
    )

    collator = trainer.data_collator
    for example in trainer.train_dataset:
        text, spans = collator._render({**example, "images": example["images"]})
        said = [text[start:end] for start, end in spans]
        answers = [m["content"] for m in example["messages"] if m["role"] == "assistant"]
        assert len(said) == len(answers)
        for span, answer in zip(said, answers, strict=True):
            assert answer in span and "w20" not in span


def test_a_stream_trains(tmp_path):
    trainer = trainer_of(tmp_path, dataset=conversations().to_iterable_dataset())
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0


def test_an_empty_dataset_is_an_error(tmp_path):
    empty_stream = datasets.IterableDataset.from_generator(lambda: iter(()))
    for dataset in (conversations().select([]), empty_stream):
        with pytest.raises(ValueError, match="the dataset is empty"):
            trainer_of(tmp_path, dataset=dataset)


def test_evaluation_does_not_depend_on_the_batches(tmp_path):
    model = tiny_model()
    found = []
    for batch_size in (1, 2, 4):
        trainer = trainer_of(tmp_path, model, per_device_eval_batch_size=batch_size)
        metrics = trainer.evaluate(conversations(images=(2, 0, 0, 0)))
        found.append([metrics["eval_lm_loss"], metrics["eval_vw_loss"]])
    assert found[0] == pytest.approx(found[1]) and found[1] == pytest.approx(found[2]) and found[0][1] > 0


def test_arguments_can_be_used_again(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    args = sft_config(tmp_path, stage="visual_words", model_init_kwargs={"pseudo_image_features": True})
    before = args.to_dict()
    for _ in range(2):
        trainer = VWLmmSFTTrainer(str(tmp_path / "model"), args, train_dataset=conversations())
        assert trainer.model.config.pseudo_image_features
    assert args.to_dict() == before


def test_a_new_chat_template_is_the_one_that_is_trained_on(tmp_path):
    (tmp_path / "new.jinja").write_text(PLAIN_TEMPLATE.replace("w97", "w96"))
    trainer = trainer_of(tmp_path, chat_template_path=str(tmp_path / "new.jinja"))
    ids = batch_of(trainer)["input_ids"]
    assert (ids == 96).any() and not (ids == 97).any()


@pytest.mark.parametrize("form", ["messages", "all text", "prompt-completion"])
def test_sequences_begin_as_the_tokenizer_begins_them(tmp_path, form):
    model = tiny_model()
    template = PLAIN_TEMPLATE.replace("{{ bos_token }}", "")
    processor = tiny_processor(model.config, template)
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    dataset = conversations(images=(1, 1, 2, 1))
    if form == "prompt-completion":
        dataset = dataset.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns="messages"
        )
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, assistant_only_loss=False if form == "all text" else None),
        train_dataset=dataset,
        processing_class=processor,
    )
    ids = batch_of(trainer)["input_ids"]
    assert (ids[:, 0] == 1).all() and (ids == 1).sum() == 4


def test_rows_without_images_may_hold_null(tmp_path):
    rows = [{**row, "images": row["images"] or None} for row in conversations()]
    trainer = trainer_of(tmp_path, dataset=datasets.Dataset.from_list(rows).cast_column("images", IMAGES))
    assert len(batch_of(trainer)["pixel_values"]) == 4


def test_an_image_in_an_answer_keeps_the_labels_around_it(tmp_path):
    part = {"type": "text"}
    answer = [{**part, "text": "w5"}, {"type": "image"}, {**part, "text": "w6 w7"}]
    messages = [{"role": "user", "content": [{**part, "text": "w8"}]}, {"role": "assistant", "content": answer}]
    template = PLAIN_TEMPLATE.replace(
        "{{ message.content[0].text }}",
        "{% for part in message.content %} {{ '<image>' if part.type == 'image' else part.text }}{% endfor %} ",
    )
    trainer = trainer_of(tmp_path, template=template)
    batch = trainer.data_collator([{"messages": messages, "images": [picture(0)]}])
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == [5, 6, 7, 2]


def test_images_that_do_not_match_their_markers_name_the_sample(tmp_path):
    def add_marker(row, index):
        if index == 3:
            row["messages"][0]["content"] = "<image> " + row["messages"][0]["content"]
        return row

    with pytest.raises(ValueError, match=r"sample 3 has 1 image\(s\), but [23] <image> markers"):
        batch_of(trainer_of(tmp_path, dataset=conversations().map(add_marker, with_indices=True)))


def test_a_conversation_that_the_template_refuses_names_the_sample(tmp_path):
    def turn_round(row, index):
        return {"messages": row["messages"][::-1] if index == 2 else row["messages"]}

    dataset = conversations().map(turn_round, with_indices=True)
    with pytest.raises(ValueError, match="sample 2: found a message of assistant, expected one of user"):
        batch_of(trainer_of(tmp_path, dataset=dataset, template=read_chat_template("mistral")))


def test_stages_work_with_adapters(tmp_path):
    model = tiny_model()
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, stage="joint"),
        train_dataset=conversations(),
        processing_class=tiny_processor(model.config),
        peft_config=LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["vm_head"]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["vw_loss"] > 0
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "vm_head.modules_to_save" in name for name in trained)


def test_training_resumes(tmp_path):
    whole = tiny_model()
    trainer_of(tmp_path / "whole", whole, max_steps=4, per_device_train_batch_size=1).train()
    first = tiny_model()
    arguments = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    interrupted = trainer_of(tmp_path / "part", first, **arguments)
    interrupted.add_callback(Stop())
    interrupted.train()
    resumed = tiny_model()
    trainer_of(tmp_path / "part", resumed, **arguments).train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
