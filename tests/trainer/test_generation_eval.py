"""Questions of the evaluation data that are answered while a model trains."""

import random

import pytest
from datasets import Dataset
from peft import LoraConfig

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import assert_same, sft_config
from modeling_vwlmm.evaluation.evaluate import evaluate
from modeling_vwlmm.evaluation.questions import questions_of
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.trainer.generation_eval import LOGGED_AS, sample_of


# A word each, which a few steps at a high rate learn
DATA = conversations().map(lambda row: {"messages": [row["messages"][0], {"role": "assistant", "content": "w7"}]})
ASKED = {"generation_eval_steps": 5, "generation_eval_max_new_tokens": 1, "max_steps": 10, "learning_rate": 0.03}


def trainer_with(tmp_path, eval_dataset=None, lora=None, **kwargs):
    model = tiny_model()
    return VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path, **{"stage": "joint", "per_device_eval_batch_size": 2, **ASKED, **kwargs}),
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        processing_class=tiny_processor(model.config),
        peft_config=lora,
    )


@pytest.mark.parametrize("kind", ["whole", "lora", "packed"])
def test_the_log_has_the_accuracy_beside_the_losses(tmp_path, capsys, kind):
    lora = LoraConfig(r=4, task_type="CAUSAL_LM") if kind == "lora" else None
    packing = {"packing": True, "max_length": 64} if kind == "packed" else {}
    trainer = trainer_with(tmp_path, DATA, lora, logging_steps=3, **packing)
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "lm_loss" in log}
    assert [step for step, log in logs.items() if LOGGED_AS in log] == [5, 10] and 3 in logs
    questions = questions_of(DATA)
    found = evaluate(trainer.model.eval(), trainer.processing_class, questions, max_new_tokens=1)
    assert logs[10][LOGGED_AS] == found.figures["exact_match"]["overall"].mean > 0
    printed = capsys.readouterr().out
    assert f"step 10: {LOGGED_AS} {logs[10][LOGGED_AS]:.4f} of 4 questions\n" in printed
    assert sum(line.endswith("right: 'w7'") for line in printed.splitlines()) == 6


def test_training_goes_on_as_if_nothing_had_been_asked(tmp_path):
    trainers = [
        trainer_with(tmp_path / str(i), data, generation_eval_steps=i) for i, data in ((None, None), (3, DATA))
    ]
    for trainer in trainers:
        trainer.model.model.language_model.config.attention_dropout = 0.5  # draws random numbers
        trainer.train()
        assert trainer.model.training
    plain, asked = ([log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers)
    assert plain == asked
    assert_same(*(dict(trainer.model.named_parameters()) for trainer in trainers), rtol=0, atol=0)


def test_each_data_set_has_an_accuracy_of_its_own_name(tmp_path):
    trainer = trainer_with(tmp_path, {"a": DATA, "b": DATA.select([0])})
    trainer.train()
    log = [log for log in trainer.state.log_history if "lm_loss" in log][-1]
    assert {name for name in log if name.startswith(LOGGED_AS)} == {f"{LOGGED_AS}_a", f"{LOGGED_AS}_b"}


def test_the_sample_is_the_same_every_time(tmp_path):
    args = sft_config(tmp_path, generation_eval_steps=1, generation_eval_samples=2)
    processor = tiny_processor(tiny_model().config)
    found = []
    for seed in (0, 1):
        random.seed(seed)
        found.append([question.id for question in sample_of(DATA, processor, args)[LOGGED_AS]])
    assert found[0] == found[1] and len(found[0]) == 2


def test_what_cannot_be_asked(tmp_path):
    with pytest.raises(ValueError, match="generation_eval_samples is 0, expected 1 or more"):
        sft_config(tmp_path, generation_eval_samples=0)
    for steps in (1.5, float("nan"), "2"):
        with pytest.raises(ValueError, match=f"generation_eval_steps is {steps!r}, expected 1 or more, a whole"):
            sft_config(tmp_path, generation_eval_steps=steps)
    for nothing in (None, {}):
        with pytest.raises(ValueError, match="of a Dataset: no eval_dataset is given"):
            trainer_with(tmp_path, nothing)
    with pytest.raises(ValueError, match="of a Dataset: the eval_dataset is a IterableDataset"):
        trainer_with(tmp_path, DATA.to_iterable_dataset())
    with pytest.raises(ValueError, match="asks about images, which the model does not see"):
        trainer_with(tmp_path, DATA, stage="read")
    broken = list(conversations().select_columns("images"))
    rows = [{**row, "messages": DATA[i]["messages"]} for i, row in enumerate(broken)]
    (tmp_path / "no.png").write_bytes(b"no image")
    rows[0]["images"] = [str(tmp_path / "no.png")]
    broken = Dataset.from_list(rows, features=DATA.features)
    with pytest.raises(ValueError, match="generation_eval_steps: sample 0: image .*no.png: UnidentifiedImageError"):
        trainer_with(tmp_path, broken)
    config = sft_config(tmp_path, skip_broken_images=True)
    assert len(sample_of(broken, tiny_processor(tiny_model().config), config)[LOGGED_AS]) == 3
    unanswered = DATA.map(lambda row: {"messages": row["messages"][:1]})
    with pytest.raises(ValueError, match="generation_eval_steps: sample 0 has no answer to compare with"):
        trainer_with(tmp_path, unanswered)
