"""VW-LMM as a model of lmms-eval, which finds it by the entry point `lmms_eval.models` of this package.

lmms-eval --model vwlmm --model_args pretrained=FOLDER --tasks pope --batch_size 16
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ..data.images import open_images
from ..data.message_images import gather_images
from ..known_fields import check_fields
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import IMAGE_MARKER, check_processor
from ..template_check import check_template
from ..weights import check_shards
from .generation import generate_answers, inputs_of, prompt_text
from .questions import Question


MANIFEST = ModelManifest(model_id="vwlmm", chat_class_path=f"{__name__}.VWLmm")
WINDOW = 32  # batches whose images are held at a time, among which questions of like length are put together


class VWLmm(lmms):
    """A VW-LMM model that lmms-eval asks.

    Answers come in the order of the requests, and are those of `model.generate` for each request alone. An image that
    does not open, or a prompt that does not fit the chat template, is an error, never an empty answer. Under
    `accelerate launch` every process has the whole model and a share of the requests.

    Args:
        pretrained: folder or repository of a model or an adapter.
        batch_size: requests at a time.
        device: where the model is, the GPU if there is one. `accelerate launch` chooses it by itself.
        dtype: of the weights, such as "bfloat16", or "auto" for that in which they are saved.
        revision: of the repository.
        max_batch_size: not used, lmms-eval gives it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        is_alone = state.num_processes == 1
        self.device = torch.device(device) if device is not None and is_alone else state.device
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}, expected a whole number, 1 or more")
        self.batch_size = int(batch_size)
        hub: dict[str, Any] = {} if revision is None else {"revision": revision}
        check_shards(pretrained)
        check_fields(pretrained, **hub)
        model: Any = VWLmmForCausalLM.from_pretrained(pretrained, dtype=dtype, **hub)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=False, **hub)
        check_processor(self.processor, model.config)
        check_template(self.processor, pretrained)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request, `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`."""
        found: list[str] = []
        for window in self._windows(requests):
            asked = [_question(doc_to_messages(self._doc(*place)), place) for _, doc_to_messages, _, *place in window]
            found += self._answers(asked, [request[2] for request in window])
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request, one a round, until its task says that there is no further round.

        The task makes the messages of a round of the answers before it.
        """
        found: list[list[str]] = []
        for window in self._windows(requests):
            said: list[list[str]] = [[] for _ in window]
            asked = {
                i: _question(doc_to_messages(self._doc(*place)), place)
                for i, (_, doc_to_messages, _, *place) in enumerate(window)
            }
            about: dict[int, Any] = {}
            while asked:
                answers = self._answers(list(asked.values()), [window[i][2] for i in asked])
                for i, answer in zip(asked, answers, strict=True):
                    said[i].append(answer)
                following = {}
                for i in asked:
                    _, doc_to_messages, _, *place = window[i]
                    round_of = {"round_idx": len(said[i]), "previous_output": list(said[i])}
                    payload = doc_to_messages(self._doc(*place), **round_of, previous_round_info=about.get(i))
                    if not isinstance(payload, tuple):  # a task of one round
                        continue
                    messages, is_over, _, about[i] = payload
                    if not is_over:
                        following[i] = _question(messages, place)
                asked = following
            found += said
        return found

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each request, `(ctx, continuation, doc_to_visual, doc_id, task, split)`, the log-probability of the
        continuation, in nats, and whether it is what greedy search says."""
        found: list[tuple[float, bool]] = []
        for window in self._windows(requests):
            for start in range(0, len(window), self.batch_size):
                found += self._scores(window[start : start + self.batch_size])
        return found

    def _scores(self, batch: Sequence[tuple]) -> list[tuple[float, bool]]:
        tokenizer, questions, texts, lengths = self.processor.tokenizer, [], [], []
        for context, continuation, *rest in batch:
            visuals: list[Any] = []
            if rest:  # without it, a continuation is scored by itself
                doc_to_visual, *place = rest
                doc = self._doc(*place)
                visuals = doc_to_visual(doc) or []
                continuation = continuation if isinstance(continuation, str) else continuation(doc)
            parts = [*({"type": "image", "url": visual} for visual in visuals), {"type": "text", "text": context}]
            question = _question([{"role": "user", "content": parts}], rest[1:])
            prompt = prompt_text(self.processor, question)
            questions.append(question)
            texts.append(prompt + continuation)
            # An image is one token here, and stands before the continuation, whose tokens are the last ones
            before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, texts[-1]))
            same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
            lengths.append(len(whole) - same)
        if not min(lengths):
            raise ValueError(f"{questions[lengths.index(0)].id}: there is nothing to score, the continuation is empty")
        images = [open_images(question.row()) for question in questions]
        inputs = inputs_of(self.processor, questions, texts, images).to(self.device, self.model.dtype)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        kept = max(lengths) + 1
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=kept).logits[:, :-1].float()
        wanted = inputs["input_ids"][:, -kept + 1 :]
        scores = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        is_greedy = logits.argmax(-1) == wanted
        return [
            (scores[i, -length:].sum().item(), bool(is_greedy[i, -length:].all())) for i, length in enumerate(lengths)
        ]

    def _answers(self, questions: Sequence[Question], settings: Sequence[dict[str, Any]]) -> list[str]:
        """An answer to each question, those of the same settings in batches."""
        groups: dict[str, list[int]] = {}
        for i, given in enumerate(settings):
            groups.setdefault(repr(sorted(given.items())), []).append(i)
        answers = [""] * len(questions)
        for places in groups.values():
            generation, until = _generation(settings[places[0]])
            asked = [questions[i] for i in places]
            found = generate_answers(self.model, self.processor, asked, self.batch_size, **generation)
            for i, answer in found:
                ends = [answer.find(text) for text in until if text in answer]
                answers[places[i]] = answer[: min(ends)] if ends else answer
        return answers

    def _windows(self, requests: Sequence[Instance]) -> Iterator[list[tuple]]:
        """The arguments of requests, so many at a time that their images fit the memory, with a progress bar."""
        size = WINDOW * self.batch_size
        with tqdm(total=len(requests), desc="requests", unit="", disable=self.rank != 0) as bar:
            for start in range(0, len(requests), size):
                window = [request.args for request in requests[start : start + size]]
                yield window
                bar.update(len(window))

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]


def _question(messages: list[dict[str, Any]], place: Sequence[Any]) -> Question:
    """A question of messages in lmms-eval's form, whose images are `{"type": "image", "url": image}`."""
    name = "document {} of {}, {}".format(*place) if place else "a continuation"
    try:
        turns, images = gather_images(messages, [], IMAGE_MARKER)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Question(name, images, turns, [])


def _generation(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a task's settings is for `model.generate`, and the texts that end an answer."""
    until = given.get("until") or []
    names = ("max_new_tokens", "num_beams", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty")
    generation = {name: given[name] for name in names if given.get(name) is not None}
    generation.setdefault("max_new_tokens", 1024)
    generation.setdefault("do_sample", generation.get("temperature", 0) > 0)
    if not generation["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            generation.pop(name, None)
    return generation, [until] if isinstance(until, str) else list(until)
