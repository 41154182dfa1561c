"""The command line: `vwlmm VERB ...`, or `python -m modeling_vwlmm VERB ...`."""

import contextlib
import sys

from .. import __version__
from . import convert, evaluate, explore, export, generate, index, merge, push, search, serve, train, words
from .errors import check_texts, is_bad_input, refuse
from .shared import ending, limit_waiting


# `vwlmm --help` lists them in this order
VERBS = {
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "merge": merge,
    "export": export,
    "push": push,
    "generate": generate,
    "words": words,
    "explore": explore,
    "index": index,
    "search": search,
    "serve": serve,
}


def main(argv: list[str] | None = None) -> None:
    """Run a verb.

    A wrong call or bad input ends with one line on stderr and exit status 2, a fault of ours with its traceback and 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv == ["--version"]:
        print(__version__)
        return
    if not argv or argv[0] not in VERBS:
        message = f'vwlmm: no verb "{argv[0]}", there are: {", ".join(VERBS)}' if argv else _overview()
        print(message, file=sys.stderr)
        sys.exit(2)
    try:
        limit_waiting()
        check_texts(argv)
        # A launcher ends the processes of a training by itself
        with contextlib.nullcontext() if argv[0] == "train" else ending():
            VERBS[argv[0]].main(argv[1:])
    except Exception as error:
        if not is_bad_input(error):
            raise
        refuse(f"vwlmm {argv[0]}", error)
    except KeyboardInterrupt as stop:
        print(f"\nvwlmm {argv[0]}: interrupted{stop}", file=sys.stderr)
        sys.exit(130)


def _overview() -> str:
    verbs = [f"  {name:<8}  {verb.SUMMARY}\n            {verb.EXAMPLE}" for name, verb in VERBS.items()]
    return "\n\n".join(["usage: vwlmm VERB ...", *verbs, "vwlmm VERB --help says more; vwlmm --version"])
