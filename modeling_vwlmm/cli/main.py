"""The command line: `vwlmm VERB ...`, or `python -m modeling_vwlmm VERB ...`."""

import sys

from huggingface_hub.errors import StrictDataclassError

from .convert import convert
from .generate import generate
from .merge import merge
from .push import push
from .train import train
from .words import words


VERBS = {
    "train": train,
    "convert": convert,
    "merge": merge,
    "push": push,
    "generate": generate,
    "words": words,
}
USAGE = """usage: vwlmm VERB ...

  train     one stage or recipe:  vwlmm train --config recipes/quickstart/stage1_align.yaml
  convert   another checkpoint:   vwlmm convert SRC DST
  merge     adapter and model:    vwlmm merge ADAPTER DST
  push      share on the Hub:     vwlmm push FOLDER REPO
  generate  answer a question:    vwlmm generate MODEL IMAGE [IMAGE ...] --prompt TEXT
  words     draw visual words:    vwlmm words MODEL IMAGE [IMAGE ...] --output FILE.png

vwlmm VERB --help says more."""


def main(argv=None):
    """Run a verb. Exit status 2 and one line on stderr for a wrong call or bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not argv or argv[0] not in VERBS:
        print(USAGE if not argv else f'vwlmm: no verb "{argv[0]}", there are: {", ".join(VERBS)}', file=sys.stderr)
        sys.exit(2)
    try:
        VERBS[argv[0]](argv[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        message = str(error)
        if "Original Traceback" in message:  # of a DataLoader worker
            message = message.strip().splitlines()[-1]
        print(f"vwlmm {argv[0]}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\nvwlmm {argv[0]}: interrupted{stop}", file=sys.stderr)
        sys.exit(130)
