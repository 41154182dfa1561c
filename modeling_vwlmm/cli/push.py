"""`vwlmm push`: shares a model on the Hub."""

import sys
from pathlib import Path

from .errors import Parser
from .shared import quiet


SUMMARY = "share a model on the Hub"
EXAMPLE = "vwlmm push runs/quickstart/joint vwlmm-easy-vqa --private"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm push",
        description="Push a model or an adapter to the Hub, with its processor, card, logs and code. It is first "
        "loaded, with and without this package; afterwards the files in the repository are compared with those sent.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("folder", help="folder of the model or adapter; it stays as it is")
    parser.add_argument("repo", help="name, or user/name; the repository is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; it is made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--base-model", help="repository of an adapter's base model, if it was trained on a folder")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; print the files, their sizes, the card")
    arguments = parser.parse_args(argv)

    import tempfile

    from huggingface_hub.utils import logging

    from ..hub.push import prepare, push
    from ..hub.repository import read_folder

    quiet()
    if not sys.stderr.isatty():
        logging.set_verbosity_error()
    if not arguments.dry_run:
        commit = push(
            arguments.folder,
            arguments.repo,
            base_model=arguments.base_model,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
        )
        print(commit.pr_url or commit.commit_url)
        return
    with tempfile.TemporaryDirectory(prefix="vwlmm-push-") as scratch:
        staged = prepare(read_folder(arguments.folder), Path(scratch), arguments.repo, arguments.base_model).folder
        sizes = {path: path.stat().st_size for path in sorted(staged.rglob("*")) if path.is_file()}
        for path, size in sizes.items():
            print(f"{size:15,}  {path.relative_to(staged)}")
        print(f"{sum(sizes.values()):15,}  bytes in {len(sizes)} files\n")
        print((staged / "README.md").read_text(encoding="utf-8"))
