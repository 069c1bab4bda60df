"""Checks of a config's fields: types, ranges and the nearest word to one that is unknown. All raise ValueError."""

import dataclasses
import difflib
import os
import reprlib
import types
import typing
from typing import Any, Literal

MOST_INT = 2**31 - 1  # JAX counts in 32 bits
MOST_FLOAT = 3.4e38  # and what it computes with ends here
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """A value as a message shows it: short, however long or deep it is."""
    return _SHORT.repr(value)


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """` Did you mean ...?` where one of the choices is close to the word, else nothing."""
    folded = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word[:80].lower(), list(folded), n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


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
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind if isinstance(kind, type) else type(None))


def _is_name(text: str) -> bool:
    """Whether a file could have that name: no NUL, and nothing that has no bytes."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _wanted(kind: object) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(part) for part in parts)
    if origin is tuple:
        return "a list of " + ({int: "whole numbers", str: "texts"}.get(parts[0]) or _wanted(parts[0]))
    if kind is types.NoneType:
        return "nothing"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def types_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """`{"model.num_layers": int, ...}`: the type of each field of a config and of its parts."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = dataclasses.is_dataclass(hint)
        found |= types_of(typing.cast(type, hint), f"{prefix}{name}.") if inner else {prefix + name: hint}
    return found


def misfit(word: str, kind: object) -> str:
    """Why a word on the command line cannot be a value of a type, nothing where it can or is not ours to judge."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal or kind is bool:
        words = list(map(str, parts)) or ["True", "False"]
        return "" if word in words else f"must be one of {', '.join(words)}.{nearest(word, words)}"
    number = next((each for each in (int, float) if each in (kind, *parts)), None)
    if number is None or typing.get_origin(kind) is tuple or (word == "None" and types.NoneType in parts):
        return ""
    try:
        number(word)
    except ValueError:
        return f"must be {_wanted(kind)}."
    return ""


def check_types(config: Any, **most: int) -> None:
    """Raises ValueError that names the first field whose value is of the wrong type, and what was expected.

    Whole numbers must be at most 2^31 - 1, or what `most` says for a field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        if not _fits(value, kind):
            words = typing.get_args(kind) if typing.get_origin(kind) is Literal and isinstance(value, str) else ()
            raise ValueError(f"{field.name}={shown(value)} must be {_wanted(kind)}.{nearest(str(value), words)}")
        limit = most.get(field.name, MOST_INT)
        for part in value if isinstance(value, tuple) else [value]:
            if int in (kind, *typing.get_args(kind)) and part is not None and part > limit:
                raise ValueError(f"{field.name}={shown(value)} must be at most {limit}.")
            if isinstance(part, str) and not _is_name(part):
                raise ValueError(f"{field.name}={shown(value)} must not hold a NUL or a lone surrogate.")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError that names the first of the fields that is below `least`."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise ValueError(f"{name}={shown(getattr(config, name))} must be at least {least}.")


def at_most(config: Any, most: float, *names: str) -> None:
    """Raises ValueError that names the first of the fields that is above `most`."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) > most:
            raise ValueError(f"{name}={shown(getattr(config, name))} must be at most {most}.")


def share(config: Any, *names: str) -> None:
    """Raises ValueError that names the first of the fields that is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must lie in [0, 1).")


def as_time(seconds: float) -> str:
    """Seconds as people write them: `1h30m`, `90s`."""
    if seconds >= 120 and seconds % 60 == 0:
        hours, minutes = divmod(int(seconds) // 60, 60)
        return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")
    return f"{seconds:g}s"
