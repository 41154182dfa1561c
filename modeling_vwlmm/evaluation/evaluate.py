"""An evaluation as a whole: questions asked, answers compared, figures by group with their intervals."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from ..files import write_json
from ..hub.card_facts import EVAL_RESULTS_NAME, INTERVAL, read_eval_results
from ..modeling_vwlmm import VWLmmForCausalLM
from ..training_run import fingerprint, read_training_run
from .answers import AnswerFile
from .generation import generate_answers
from .intervals import Interval, interval
from .metrics import METRICS, TITLES, check_metrics, fitting_metrics
from .questions import Question, column_of


OVERALL = "overall"


@dataclass
class Evaluation:
    """What came of an evaluation.

    Args:
        questions, answers: in the order of the data.
        skipped: questions that were not asked, because an image of theirs does not open.
        scores: of every metric, a number a question.
        figures: of every metric, the groups by name, `OVERALL` first.
    """

    questions: list[Question]
    answers: list[str]
    skipped: list[Question]
    scores: dict[str, list[float]]
    figures: dict[str, dict[str, Interval]]


def evaluate(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = (),
    batch_size: int = 32,
    answers_path: str | os.PathLike | None = None,
    progress: bool = False,
    **generation: Any,
) -> Evaluation:
    """Ask a model questions, and measure its answers.

    Args:
        model, processor: a pair.
        questions: those of [`load_questions`] or [`questions_of`].
        metrics: keys of `METRICS`; those that fit the data if not given.
        by: columns by whose values the figures are given too.
        batch_size: questions at a time.
        answers_path: a file to write answers to, and to go on from, see [`AnswerFile`].
        progress: whether a bar shows it on a terminal.
        generation: of `model.generate`; `max_new_tokens` is 64 if not given.

    Questions about images that do not open are left out, with a warning that names each image.

    Raises:
        ValueError: there are no questions, a metric or a column does not fit the data, no image can be read, or the
            file has answers of something else.
    """
    if not questions:
        raise ValueError("there are no questions")
    questions = list(questions)
    unanswered = [question.id for question in questions if not question.answers]
    if unanswered:
        raise ValueError(f"{len(unanswered)} questions have no right answer, the first is {unanswered[0]}")
    references = [question.answers for question in questions]
    metrics = list(metrics or fitting_metrics(references))
    check_metrics(metrics, references)
    for name in by:
        column_of(questions, name)
    generation = {"max_new_tokens": 64, **generation}

    how: dict[str, Any] = {"progress": progress, "skip_broken_images": True, **generation}
    settings = {**generation, "pseudo_image_features": model.config.pseudo_image_features, "dtype": str(model.dtype)}
    if answers_path is None:
        found = dict(generate_answers(model, processor, questions, batch_size, **how))
    else:
        file = AnswerFile(answers_path, questions, {"model": fingerprint(model), **settings})
        missing = file.missing()
        asked = [questions[i] for i in missing]
        new = generate_answers(model, processor, asked, batch_size, **how)
        for _ in file.write((missing[i], answer) for i, answer in new) if missing else ():
            pass
        found = file.answers
    skipped = [question for i, question in enumerate(questions) if i not in found]
    if not found:
        raise ValueError(f"none of the {len(questions)} questions can be asked: their images do not open")
    asked = [question for i, question in enumerate(questions) if i in found]
    answers = [found[i].strip() for i in sorted(found)]
    scores = {name: METRICS[name](answers, [question.answers for question in asked]) for name in metrics}
    figures = {name: figures_of(asked, scores[name], by) for name in metrics}
    return Evaluation(asked, answers, skipped, scores, figures)


def figures_of(questions: Sequence[Question], scores: Sequence[float], by: Sequence[str] = ()) -> dict[str, Interval]:
    """The mean score of all questions, and of those of each value of the columns `by`, with intervals over images."""
    questions = list(questions)
    groups = {OVERALL: list(range(len(questions)))}
    for column in by:
        for i, value in enumerate(column_of(questions, column)):
            groups.setdefault(value if len(by) == 1 else f"{column} {value}", []).append(i)
    return {
        name: interval([scores[i] for i in places], [questions[i].image_key for i in places])
        for name, places in groups.items()
    }


def table(evaluation: Evaluation) -> str:
    """The figures as text: a line a group. Metrics from 0 to 1 are in %."""
    names = list(evaluation.figures)
    groups = list(evaluation.figures[names[0]])
    width = max(len("group"), *map(len, groups))
    lines = [f"{'':{width}}" + "".join(f"{_title(name):>30}" for name in names) + f"{'questions':>11}{'images':>8}"]
    for group in groups:
        figures = [evaluation.figures[name][group] for name in names]
        shown = "".join(f"{_shown(figure, name):>30}" for name, figure in zip(names, figures, strict=True))
        lines.append(f"{group:{width}}{shown}{figures[0].values:11,}{figures[0].images:8,}")
    if evaluation.skipped:
        images = len({question.image_key for question in evaluation.skipped})
        title = "not asked, for images that do not open"
        lines.append(f"{title:{width + 30 * len(names)}}{len(evaluation.skipped):11,}{images:8,}")
    return "\n".join(lines)


def _title(metric: str) -> str:
    return TITLES[metric] + ("" if metric == "cider" else ", %")


def _shown(figure: Interval, metric: str) -> str:
    scale = 1 if metric == "cider" else 100
    return f"{scale * figure.mean:.2f} [{scale * figure.low:.2f}, {scale * figure.high:.2f}]"


def results_of(evaluation: Evaluation, dataset: str, split: str) -> list[dict[str, Any]]:
    """The figures in the form of `eval_results.json`: the fields of [`~huggingface_hub.EvalResult`].

    Args:
        dataset, split: their names.
    """
    skipped = {"questions skipped": len(evaluation.skipped)} if evaluation.skipped else {}
    return [
        {
            "task_type": "visual-question-answering",
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_split": split,
            "dataset_args": {"questions": figures[OVERALL].values, "images": figures[OVERALL].images, **skipped},
            "metric_type": "accuracy" if metric == "exact_match" else metric,
            "metric_name": TITLES[metric] + ("" if group == OVERALL else f", {group}"),
            "metric_value": round(figure.mean, 4),
            "metric_args": {INTERVAL: [round(figure.low, 4), round(figure.high, 4)]},
        }
        for metric, figures in evaluation.figures.items()
        for group, figure in figures.items()
    ]


def write_results(folder: str | os.PathLike, results: Sequence[dict[str, Any]]) -> Path:
    """Write results into the `eval_results.json` of a folder, in place of those of the same figures.

    Raises:
        ValueError: the file there holds something else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [
        {name: value for name, value in asdict(result).items() if value is not None and name != "verified"}
        for result in read_eval_results(folder, read_training_run(folder))
    ]
    identity = itemgetter("task_type", "dataset_name", "dataset_split", "metric_name")
    known = [{"dataset_split": None, "metric_name": None, **result} for result in kept]
    new = {identity(result) for result in results}
    kept = [result for result, full in zip(kept, known, strict=True) if identity(full) not in new]
    path = folder / EVAL_RESULTS_NAME
    write_json(path, [*kept, *results])
    return path


def dataset_name(name: str) -> str:
    """What a data set is called in a record: a file's or folder's own name, without its place."""
    is_file = name.endswith((".json", ".jsonl"))
    return Path(name).stem if is_file else Path(name).name if os.path.isdir(name) else name
