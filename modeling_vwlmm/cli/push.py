"""`vwlmm push`: shares a model on the Hub."""

import sys

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

    from huggingface_hub import get_token
    from huggingface_hub.utils import logging

    from ..hub.push import Target, look_at, prepare, push, scratch_folder
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
    token = get_token()
    where = (arguments.base_model, arguments.private or None, arguments.revision, arguments.create_pr)
    try:
        target = look_at(arguments.folder, arguments.repo, *where, token)
    except OSError as error:
        print(f"vwlmm push: the repository was not looked at: {error}", file=sys.stderr)
        target = Target(read_folder(arguments.folder), arguments.repo, arguments.base_model, None, None)
    with scratch_folder() as scratch:
        staged = prepare(target.model, scratch, target.repo_id, arguments.base_model, target.card_text, token).folder
        sizes = {path: path.stat().st_size for path in sorted(staged.rglob("*")) if path.is_file()}
        for path, size in sizes.items():
            print(f"{size:15,}  {path.relative_to(staged)}")
        print(f"{sum(sizes.values()):15,}  bytes in {len(sizes)} files")
        what = "a new repository" if target.info is None else "the repository"
        private = (arguments.private if target.info is None else target.info.private) or False
        goes_to = "a pull request" if arguments.create_pr else f"the branch {arguments.revision or 'main'}"
        print(f"would go to {goes_to} of {what} {target.repo_id}, {'private' if private else 'public'}\n")
        print((staged / "README.md").read_text(encoding="utf-8"))
