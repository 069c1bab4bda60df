"""Checks of a config's fields: types, ranges and the nearest word to one that is unknown. All raise ValueError."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """` Did you mean ...?` where one of the choices is close to the word, else nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _fits(value: object, kind: object) -> bool:
    """Whether a value has the type that a field is annotated with. A bool is no int here, and an int is a float."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind if isinstance(kind, type) else type(None))


def _wanted(kind: object) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(part) for part in parts)
    if origin is tuple:
        return f"several of {_wanted(parts[0])}"
    if kind is types.NoneType:
        return "nothing"
    return {int: "a whole number", float: "a finite number"}.get(kind, getattr(kind, "__name__", str(kind)))


def check_types(config: Any) -> None:
    """Raises ValueError that names the first field whose value is of the wrong type, and what was expected."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        if not _fits(value, kind):
            choices = [str(part) for part in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []
            raise ValueError(
                f"{field.name}={value!r} must be {_wanted(kind)}.{nearest(str(value), choices) if choices else ''}"
            )


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError that names the first of the fields that is below `least`."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}.")


def share(config: Any, *names: str) -> None:
    """Raises ValueError that names the first of the fields that is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must lie in [0, 1).")
