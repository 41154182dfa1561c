"""Takes what must not leave the machine out of a text or a JSON value: paths, tokens, names of code."""

import getpass
import os
import re
import socket
from typing import Any


# What gives access to something: the part that a text loses. Each has a form of its own, so that a hash is none
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}"
    r"|\bsk-[\w-]{20,}|\bAIza[\w-]{35}|\bAKIA[0-9A-Z]{16}\b|\bxox[abeoprs]-[\w-]{10,}|\bglpat-[\w-]{20,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bwandb_v\d_\w{20,}"
    r"|(?i:(?<=wandb)[^\n]{0,30}\b[0-9a-f]{40}\b|\bapi[_-]?key\b\W{1,5}[0-9a-f]{40}\b)"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user:password
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?",
    re.DOTALL,
)
# Parts of a path. A blank is one only where another / follows: /home/me/My Pictures/x
_PARTS = r"""(?:[^/\s"',;:()`]+(?: \w[^/\s"',;:()`]*)*(?=/)/)*(?:[^/\s"',;:()`|]+/?)?"""
_PATH = re.compile(
    rf"""(?<![\w./\\<>~*)-])(?!//)(?:file://)?(?:~[\w-]*)?/(?=[^/\s"',;:()]){_PARTS}"""  # /home/me/x, ~/x
    rf"""|(?<![\w./])(?:\.\./)+{_PARTS}"""  # ../../x
    r"""|(?<!\w)[A-Za-z]:[\\/][^\s"',;]+|\\\\[\w.-]+\\[^\s"',;]+"""  # C:\x, \\host\x
)
_WHOLE_PATH = re.compile(r"(?:file://|[/~]|\.\.[/\\]|[A-Za-z]:[\\/]|\\\\)[^\n]*")


def base_name(path: str) -> str:
    """The last part of a path, of any system; `~` for the home folder, which often is the name of a person."""
    name = re.split(r"[/\\]", os.path.normpath(path).rstrip("/\\"))[-1]
    return "~" if name in ("", os.path.basename(os.path.expanduser("~"))) else name


def holds_token(text: str, token: str | None = None) -> bool:
    """Whether a text holds this token, or anything that looks like a token, password or private key."""
    return bool(_TOKEN.search(text)) or bool(token and token in text)


def without_tokens(text: str, token: str | None = None) -> str:
    """A text without this token, and without anything that looks like a token, password or private key."""
    text = text.replace(token, "***") if token else text
    return _TOKEN.sub(lambda match: "hf_***" if match[0].startswith("hf_") else "***", text)


def without_secrets(value: Any) -> Any:
    """A JSON value without tokens, without users' names at machines and without the name of this machine.

    Keys are left, for a machine may be called like one.
    """
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return without_tokens(_without_machine(value)) if isinstance(value, str) else value


def _without_machine(text: str) -> str:
    host = socket.gethostname()
    for name in dict.fromkeys([host, host.partition(".")[0]]):
        if len(name) > 3 and name != "localhost":
            text = re.sub(rf"(?:[\w.+-]+@)?\b{re.escape(name)}\b", "host", text)
    try:
        user = re.escape(getpass.getuser())
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return text
    return re.sub(rf"\b{user}@[\w.-]+", "host", text)


def _in_a_home(path: str) -> bool:
    """Whether a path says whose it is: in a home folder, or relative to a place that only its writer knows."""
    home = os.path.expanduser("~").rstrip("/")
    is_own = bool(home) and path.removeprefix("file://").startswith(f"{home}/")  # with / for home, nothing is
    return is_own or bool(re.match(r"(?:file://)?/(?:home|Users)/.|/root/|~|(?:\.\./){2}|[A-Za-z]:\\Users\\", path))


def without_home(text: str) -> str:
    """A text that others may read, with the base names of the paths of home folders and without this machine's name.

    Other paths are left: a text may be about them.
    """
    host = socket.gethostname()
    if re.search(r"[\d.-]", host):  # a machine that is called by a plain word would take that word from the text
        text = _without_machine(text)
    return _PATH.sub(lambda match: base_name(match[0]) if _in_a_home(match[0]) else match[0], text)


def private_place(text: str) -> str | None:
    """The first path of a home folder in a text, None if there is none."""
    return next((match[0] for match in _PATH.finditer(text) if _in_a_home(match[0])), None)


def without_paths(value: Any, is_log: bool, key: str = "") -> Any:
    """A JSON value with the base names of its absolute paths.

    In a log every path is shortened. A config may hold other things that look like a path, such as a regular
    expression, so there a string is shortened only if all of it is a path and its key says so (`_name_or_path`).
    """
    if isinstance(value, dict):
        return {without_paths(name, is_log): without_paths(item, is_log, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, is_log, key) for item in value]
    if not isinstance(value, str):
        return value
    if _WHOLE_PATH.fullmatch(value) and (is_log or re.search("path|file|dir|folder", key)):
        return base_name(value)
    return _PATH.sub(lambda match: base_name(match[0]), value) if is_log else value
