"""Compares the values of a recipe with the types of the fields that they are given to."""

import difflib
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_SPELT = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def check_values(source: str, values: dict[str, Any], kinds: tuple[type, ...]) -> dict[str, Any]:
    """The values, where a text that stands for a list of texts has become that list.

    Args:
        source: what gave the values, for the message.
        values: by the names of fields.
        kinds: the dataclasses that have the fields.

    Raises:
        ValueError: a value is of another type than its field, or none of its choices, which argparse compares on the
            command line alone. A text may still be a number, which argparse reads.
    """
    hints: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    for kind in kinds:
        hints |= get_type_hints(kind)
        choices |= {known.name: known.metadata.get("choices") for known in fields(kind)}
    checked = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(value, str) and not _fits(value, hint) and _fits([value], hint):
            value = [value]
        is_no_mapping = name.endswith("_kwargs") and isinstance(value, str) and not value.lstrip().startswith("{")
        if is_no_mapping or not _fits(value, hint):
            expected = "a mapping" if name.endswith("_kwargs") else _spelt(hint)
            found = "null" if value is None else repr(value)
            found = found if len(found) <= 80 else f"{found[:77]}..."
            raise ValueError(f"{source}: {name} is {found}, expected {expected}")
        if choices.get(name) is not None and value is not None and value not in choices[name]:
            raise ValueError(f'{source}: {name} is "{value}", expected one of {", ".join(choices[name])}')
        checked[name] = value
        item = next((arg for arg in get_args(hint) if is_dataclass(arg)), None)
        if isinstance(item, type):  # a list of them
            for i, fields_of_item in enumerate(value):
                if isinstance(fields_of_item, dict):
                    _check_item(f"{source}: {name}[{i}]", fields_of_item, item)
    return checked


def _check_item(source: str, values: dict[str, Any], kind: type) -> None:
    check_names(source, values, [known.name for known in fields(kind)])
    for known in fields(kind):
        if known.default is MISSING and known.default_factory is MISSING and known.name not in values:
            raise ValueError(f"{source}: {known.name} is missing, expected {_spelt(get_type_hints(kind)[known.name])}")
    check_values(source, values, (kind,))


def check_names(source: str, values: dict[str, Any], known: list[str]) -> None:
    """`ValueError` for a field that there is not, with the one that may be meant."""
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f'{source}: unknown field "{name}"' + (f', is "{close[0]}" meant?' if close else ""))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (list, tuple, set):
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value if args)
    if hint is bool:
        return isinstance(value, (bool, str))
    if hint in (int, float):
        return isinstance(value, (int, str) if hint is int else (int, float, str)) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (str, hint))
    if is_dataclass(hint):
        return isinstance(value, (dict, str, hint))  # type: ignore[arg-type]  # it is a class
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _spelt(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spelt(arg) for arg in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is list or hint is list:
        return "a list" + (f", each {_spelt(args[0])}" if args else "")
    if origin is dict or hint is dict or is_dataclass(hint):
        return "a mapping"
    return "a text" if isinstance(hint, type) and issubclass(hint, Enum) else _SPELT.get(hint, str(hint))
