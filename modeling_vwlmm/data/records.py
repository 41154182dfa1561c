"""The records of a JSON or JSON Lines file, one at a time: a file may be larger than the memory."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

from ..files import describe


PIECE = 2**22  # characters that are read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_ENDS = (",", "]", " ", "\t", "\n", "\r")
_DECODER = json.JSONDecoder()


def read_records(data_path: str | os.PathLike) -> Iterator[Any]:
    """Yields what a .jsonl file has in its lines, or what the list of any other file holds.

    Raises:
        ValueError: the file is no valid JSON, or no list. Records before the place where that shows are yielded first.
    """
    data_path = os.fspath(data_path)
    if not data_path.endswith(".jsonl"):
        yield from _read_list(data_path)
        return
    with open(data_path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise _invalid(f"{data_path}: line {number}", error) from error
            if line.strip():
                yield record


def _read_list(data_path: str) -> Iterator[Any]:
    with open(data_path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    try:
        with open(data_path, encoding=encoding, errors="surrogatepass", newline="") as file:
            yield from _ListItems(file)
        return
    except (ValueError, RecursionError) as error:
        problem = error
    # What is wrong, and where, is said by the module for JSON itself, which takes all of a file
    with open(data_path, "rb") as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise _invalid(data_path, error) from error
    if isinstance(found, list):
        raise _invalid(data_path, problem)
    raise ValueError(f"{data_path}: found {describe(found)}, expected a list of records")


def _invalid(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: found no valid JSON ({error}), expected records of conversations")


class _ListItems:
    """Iterates over the items of a list in JSON; `ValueError` if the text is no such list. An empty text has none."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.place = file, "", 0

    def __iter__(self) -> Iterator[Any]:
        opening = self._next_character()
        if not opening:
            return
        self.place += 1
        if opening != "[":
            raise ValueError("no list")
        is_last = self._next_character() == "]"
        self.place += is_last
        while not is_last:
            yield self._next_item()
            separator = self._next_character()
            self.place += 1
            is_last = separator == "]"
            if not is_last and separator != ",":
                raise ValueError("no comma after an item")
        if self._next_character():
            raise ValueError("more after the list")

    def _next_item(self) -> Any:
        self._next_character()
        while True:
            try:
                item, end = _DECODER.raw_decode(self.text, self.place)
            except ValueError:
                if not self._read_on():
                    raise
                continue
            # At the end of what was read, a number may go on
            if self.text.startswith(_ENDS, end) or not self._read_on():
                self.place = end
                return item

    def _next_character(self) -> str:
        """What follows after white space, the empty text at the end of the file."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]  # it matches anything
            if self.place < len(self.text) or not self._read_on():
                return self.text[self.place : self.place + 1]

    def _read_on(self) -> bool:
        """Put more text behind what is not read yet, as much again at least; whether there was some."""
        rest = self.text[self.place :]
        more = self.file.read(max(PIECE, len(rest)))
        self.text, self.place = rest + more, 0
        return bool(more)
