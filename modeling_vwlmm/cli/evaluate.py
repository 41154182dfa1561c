"""`vwlmm evaluate`: asks a model the questions of a data set and measures its answers."""

from .errors import Parser
from .shared import load


SUMMARY = "answers to your own held-out questions, and how many are right"
EXAMPLE = "vwlmm evaluate runs/quickstart/joint --dataset easy-vqa/question --by kind"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm evaluate",
        description="Ask a model the questions of a data set, greedily, and compare its answers with the right ones. "
        "Figures come with 95 %% intervals over images drawn anew. Interrupted, the same command goes on.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository of a model or an adapter")
    parser.add_argument(
        "--dataset", required=True, help="LLaVA's JSON, a folder of save_to_disk, a repository, or easy-vqa/question"
    )
    parser.add_argument("--image_folder", "--image-folder", help="the folder of the images that a JSON file names")
    parser.add_argument("--split", default="test", help="the part of a data set that has parts (default: test)")
    parser.add_argument("--adapter", help="folder or repository of an adapter for the model")
    parser.add_argument(
        "--metric",
        nargs="+",
        help="exact_match, vqa_accuracy, rouge_l, cider; what fits the data if not given (rouge_l and cider are for "
        "captions)",
    )
    parser.add_argument("--by", nargs="+", default=[], metavar="COLUMN", help="figures for each value of it too")
    parser.add_argument("--history", action="store_true", help="ask after the turns before, with their right answers")
    parser.add_argument("--limit", type=int, help="ask the first questions only")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="the longest answer (default: 64)")
    parser.add_argument(
        "--output",
        help="folder for answers-DATASET.jsonl and eval_results.json, from which the card is made (default: that of "
        "the model or adapter; the current one if that is a repository)",
    )
    limits = parser.add_argument_group("the limits report")
    limits.add_argument(
        "--limits",
        action="store_true",
        help="what the visual words keep, name and favour, on held-out and training images, as limits.md, limits.json "
        "and assets/limits.png, and in eval_results.json",
    )
    limits.add_argument("--train-dataset", help="data that the model was trained on, to compare with --dataset")
    limits.add_argument("--train-split", default="train", help="its split (default: train)")
    limits.add_argument("--retrained", metavar="MODEL", help="a model trained to read pseudo image features")
    arguments = parser.parse_args(argv)
    if not arguments.limits and (arguments.train_dataset or arguments.retrained):
        parser.error("--train-dataset and --retrained are for --limits")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 or more")

    import os

    import datasets

    from ..evaluation.evaluate import dataset_name, evaluate, results_of, table, write_results
    from ..evaluation.questions import load_questions

    datasets.disable_progress_bars()
    questions = load_questions(
        arguments.dataset, arguments.image_folder, arguments.split, arguments.history, arguments.limit
    )
    model, processor = load(arguments.model, arguments.adapter)
    place = arguments.adapter or arguments.model
    output = arguments.output or (place if os.path.isdir(place) else ".")
    name = dataset_name(arguments.dataset)
    if arguments.limits:
        _limits(arguments, questions, model, processor, output, name)
        return
    path = os.path.join(output, f"answers-{name.replace('/', '-')}{'-history' if arguments.history else ''}.jsonl")
    evaluation = evaluate(
        model,
        processor,
        questions,
        metrics=arguments.metric,
        by=arguments.by,
        batch_size=arguments.batch_size,
        answers_path=path,
        progress=True,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(table(evaluation))
    results = results_of(evaluation, name, arguments.split)
    print(f"answers: {path}\nfigures: {write_results(output, results)}")


def _limits(arguments, questions, model, processor, output, name):
    from pathlib import Path

    from ..evaluation.evaluate import write_results
    from ..evaluation.limits_page import markdown, results_of_limits, write_page
    from ..evaluation.limits_report import report
    from ..evaluation.questions import load_questions

    splits = {"held out": questions}
    if arguments.train_dataset:
        splits["training"] = load_questions(
            arguments.train_dataset,
            arguments.image_folder,
            arguments.train_split,
            arguments.history,
            arguments.limit,
        )
    retrained = load(arguments.retrained)[0] if arguments.retrained else None
    if retrained is not None and not retrained.config.pseudo_image_features:
        raise ValueError(f"{arguments.retrained} reads features, expected a model trained with pseudo_image_features")
    rows = report(
        model,
        processor,
        splits,
        retrained,
        answers_folder=output,
        metrics=arguments.metric,
        batch_size=arguments.batch_size,
        progress=True,
        max_new_tokens=arguments.max_new_tokens,
    )
    title = Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model
    print(markdown(rows, title))
    write_results(output, results_of_limits(rows, name))
    print(f"page: {write_page(rows, Path(output), title)}")
