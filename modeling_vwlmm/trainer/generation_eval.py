"""Asks a model questions while it trains, and logs how many answers are right."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import LlavaProcessor, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..data.images import open_images
from ..evaluation.generation import generate_answers
from ..evaluation.metrics import METRICS, fitting_metrics
from ..evaluation.questions import Question, questions_of
from .sft_config import VWLmmSFTConfig


logger = logging.get_logger(__name__)

SHOWN = 3  # answers that are printed
LOGGED_AS = "generation_accuracy"


class GenerationEval(TrainerCallback):
    """Answers a fixed sample of the questions of the evaluation data, greedily, every `generation_eval_steps` steps.

    The log of that step has `generation_accuracy` beside the losses, the share of right answers or the VQA challenge's
    accuracy, whichever fits the data, and some answers are printed. Of several data sets by name, each has its own,
    `generation_accuracy_NAME`. Training goes on as if nothing had been asked.

    Processes share the questions. Under FSDP2 weights stay sharded; ZeRO-3 and FSDP1 are refused.

    Args:
        trainer: a [`VWLmmSFTTrainer`].
        questions: those of [`sample_of`], by what their accuracy is logged as.

    Raises:
        ValueError: the weights are sharded by ZeRO-3 or FSDP1.
    """

    def __init__(self, trainer: Trainer, questions: dict[str, list[Question]]):
        if is_deepspeed_zero3_enabled() or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
            raise ValueError(
                "generation_eval_steps generates with weights that are whole or sharded by FSDP2: leave it out under "
                "ZeRO-3 and FSDP1, and run vwlmm evaluate on checkpoints"
            )
        self.trainer, self.questions = trainer, questions

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.generation_eval_steps:
            return
        was_training = model.training
        model.eval()
        try:
            for name, questions in self.questions.items():
                answers = self._answers(model, questions, args)
                references = [question.answers for question in questions]
                scores = METRICS[fitting_metrics(references)[0]](answers, references)
                accuracy = sum(scores) / len(scores)
                self.trainer._metrics["train"][name].append(accuracy)
                if state.is_world_process_zero:
                    tqdm.write(f"step {state.global_step}: {name} {accuracy:.4f} of {len(questions)} questions")
                    for question, answer in list(zip(questions, answers, strict=True))[:SHOWN]:
                        tqdm.write(f"  {question.text!r} {answer!r}, right: {', '.join(map(repr, question.answers))}")
        finally:
            model.train(was_training)
        control.should_log = True  # with the losses

    def _answers(self, model: Any, questions: list[Question], args: VWLmmSFTConfig) -> list[str]:
        """An answer to each question, on every process."""
        rank, processes = args.process_index, args.world_size
        # Processes that share weights must run the model equally often: the last ones may ask a question again
        most = -(-len(questions) // processes)
        places = [(rank + k * processes) % len(questions) for k in range(most)]
        is_sharded = isinstance(model, FSDPModule)
        processor: Any = self.trainer.processing_class
        with self.trainer.accelerator.autocast(), images_in_forward(model) if is_sharded else contextlib.nullcontext():
            answers = generate_answers(
                model,
                processor,
                [questions[place] for place in places],
                args.per_device_eval_batch_size,
                max_new_tokens=args.generation_eval_max_new_tokens,
                use_cache=True,  # which activation checkpointing turns off
                synced_gpus=is_sharded,
            )
            found = [(places[i], answer.strip()) for i, answer in answers]
        if processes > 1:
            found = gather_object(found)
        by_place = dict(found)
        return [by_place[place] for place in range(len(questions))]


@contextlib.contextmanager
def images_in_forward(model: Any) -> Iterator[None]:
    """Let `generate` read images in its first forward pass, where FSDP has the weights ready, not before it."""
    base_model = model.get_base_model() if is_peft_model(model) else model
    base_model._supports_mm_encoder_outputs = lambda: False
    try:
        yield
    finally:
        del base_model._supports_mm_encoder_outputs


def sample_of(eval_dataset: Any, processor: Any, args: VWLmmSFTConfig) -> dict[str, list[Question]]:
    """The questions that a [`GenerationEval`] asks: `generation_eval_samples` at most of each data set, whatever the
    seed of the run, by what their accuracy is logged as.

    Raises:
        ValueError: there are no evaluation data, they are a stream, have no answers, or an image does not open; or the
            model is not trained on images.
    """
    if args.stage == "read" or not isinstance(processor, LlavaProcessor):
        raise ValueError("generation_eval_steps asks about images, which the model does not see in this training")
    if not (isinstance(eval_dataset, dict) and eval_dataset):
        eval_dataset = {None: None if isinstance(eval_dataset, dict) else eval_dataset}
    found = {}
    for name, dataset in eval_dataset.items():
        if not isinstance(dataset, Dataset):
            what = "no eval_dataset is given" if dataset is None else f"the eval_dataset is a {type(dataset).__name__}"
            raise ValueError(f"generation_eval_steps asks questions of evaluation data, of a Dataset: {what}")
        draw = random.Random(0)
        rows = sorted(draw.sample(range(len(dataset)), min(len(dataset), args.generation_eval_samples)))
        try:
            questions = [question for question in questions_of(dataset.select(rows)) if question.answers]
            questions = draw.sample(questions, min(len(questions), args.generation_eval_samples))
            # Now: a process that could not open one later would leave the others waiting
            questions = [question for question in questions if _opens(question, args.skip_broken_images)]
            if not questions:
                raise ValueError("no image of the questions opens")
        except ValueError as error:
            raise ValueError(f"generation_eval_steps: {error}") from error
        found[LOGGED_AS if name is None else f"{LOGGED_AS}_{name}"] = questions
    return found


def _opens(question: Question, may_skip: bool) -> bool:
    try:
        open_images(question.row())
    except ValueError as error:
        if not may_skip:
            raise
        logger.warning(f"skipped: {error}")
        return False
    return True
