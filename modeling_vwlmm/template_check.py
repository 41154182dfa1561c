"""Whether a model's chat template, which is a program of whoever wrote it, ends."""

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError


SECONDS = 10  # of computing, for a text that takes a few thousandths of one
MEMORY = 2**30  # bytes beyond those that the process has
_OUT_OF_MEMORY = 3  # an exit status
_ENDLESS = "the chat template does not end within {} seconds"
# Templates look at who speaks, how often, and whether there are images
_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Answer."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ],
]


def check_template(processor: Any, name: str | os.PathLike) -> None:
    """Render a processor's chat template in a process that the system ends if it takes long or much memory.

    The sandbox that transformers renders templates in bounds a single `range`, but neither loops in loops nor powers
    nor texts that double. What else is wrong with a template is said where it is used. Without `fork`, and in a daemon
    of `multiprocessing`, which may start no process, nothing is checked.

    Args:
        processor: with its `chat_template`.
        name: of its folder or repository, for the error message.

    Raises:
        ValueError: the template does not end, or takes more than a GiB.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
    if getattr(processor, "chat_template", None) is None or not can_fork:
        return
    child = multiprocessing.get_context("fork").Process(target=_render, args=[processor])
    with warnings.catch_warnings():
        # Python warns of a fork beside threads: the child takes no lock of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(6 * SECONDS)
    if child.exitcode is None:  # it waits for something that the fork has left behind
        child.kill()
        child.join()
        return
    if child.exitcode < 0:  # a signal
        raise ValueError(f"{name}: {_ENDLESS.format(SECONDS)}")
    if child.exitcode == _OUT_OF_MEMORY:
        raise ValueError(f"{name}: the chat template makes a text of more than a GiB of memory")


def _render(processor: Any) -> None:
    _limit_this_process()
    for messages in _CONVERSATIONS:
        try:
            processor.apply_chat_template(messages, add_generation_prompt=True)
        except MemoryError:
            sys.exit(_OUT_OF_MEMORY)
        except Exception:  # it refuses this conversation
            continue


def _limit_this_process() -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no Linux
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Make a `ValueError` of whatever a template raises, and of one that takes more than `SECONDS`.

    A template may loop over what only some conversations hold, which [`check_template`] does not see. Time is taken in
    the main thread of a process alone, and of computing: a process may be stopped meanwhile.
    """
    try:
        with _alarm():
            yield
    except (ValueError, TemplateError, MemoryError):
        raise
    except Exception as error:  # it is a program: it may divide by zero
        raise ValueError(f"the chat template fails with {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGVTALRM, _stop)
    except (ValueError, AttributeError):  # another thread, or Windows
        yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: Any) -> None:
    raise ValueError(_ENDLESS.format(SECONDS))
