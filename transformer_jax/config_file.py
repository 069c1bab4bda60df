"""Configs <-> JSON and plain dicts, and what differs between two of them."""

import dataclasses
import json
import os
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformer_jax.config import RunConfig, TokenizerName
from transformer_jax.config_checks import nearest, shown
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole

MOST_BYTES = 2**20  # of a config: ours have 4,000

# What a run may change without becoming another run: where and how often, not what is computed.
FREE = (
    "recipe",
    "workdir",
    "eval_every",
    "eval_rows",
    "log_every",
    "writers",
    "num_samples",
    "max_new_tokens",
    "stop_at",
    "stop_after",
    "max_skipped",
    "stall_after",
    "accept_changes",
    "deterministic",
    "parallel",
    "checkpoint",
    "model.remat",
    "data.workers",
)


def to_json(config: RunConfig) -> str:
    """The whole config as JSON, one field a line, but for which of several processes this is."""
    parallel = dataclasses.replace(config.parallel, coordinator="", num_processes=None, process_id=None)
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, parallel=parallel)), indent=2) + "\n"


def _nearest_field(name: str, hints: dict[str, Any]) -> str:
    """The field that was meant: one of that name in a part of the config, or the nearest here."""
    parts = [part for part, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for part in parts:
        if name in (field.name for field in dataclasses.fields(hints[part])):
            return f" Did you mean {f'{part}.{name}'!r}?"
    return nearest(name, hints)


def _from_dict(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with the fields of {kind.__name__}; got {shown(values)}.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"{where}: unknown field {shown(name)}.{_nearest_field(name, hints)}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _from_dict(hints[name], value, f"{where}, {name}")
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except ValueError as error:
        reason = str(error)  # which quotes the value
        raise InputError(f"{where}: {reason if len(reason) < 600 else f'{reason[:300]} ... {reason[-200:]}'}") from None


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json.loads`: raises ValueError for a name that an object has twice, of which JSON takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {shown(twin)} is given more than once")
    return found


def read_config(path: str | Path) -> RunConfig:
    """The run's settings in a `config.json`.

    Raises:
        InputError: the file is missing, is not JSON, or has an unknown field or a wrong value.
    """
    text = decode(path, read_whole(path, MOST_BYTES))
    try:
        values = json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the config is not JSON ({error}).") from None
    return _from_dict(RunConfig, values, str(path))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.num_layers": 6, ...}`."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{field.name}.") if inner else {prefix + field.name: value}
    return found


def _meant(name: str, value: Any, place: Callable[[str], str]) -> Any:
    """A value as it is compared: the paths of data and of a tokenizer by their `place`."""
    if name in ("data.train", "data.validation"):
        return tuple(map(place, value))
    if name == "data.mixture":
        return tuple((place(path), share) for path, _, share in (text.rpartition("=") for text in value))
    if name == "data.validation_sets":
        return tuple((label, place(path)) for label, _, path in (text.partition("=") for text in value))
    if name in ("data.tokenizer", "data.source_tokenizer"):
        return value if value in ("", *typing.get_args(TokenizerName)) else place(value)
    if name == "init_from":
        return value and os.path.realpath(value)
    return value


def differences(old: RunConfig, new: RunConfig, moved: bool = False) -> list[str]:
    """`model.num_layers: 6 -> 4` for each field that makes the second another run than the first.

    Args:
        moved: its data and its tokenizer may lie elsewhere, as their contents are compared apart.
    """
    before, after = flat(old), flat(new)
    place: Callable[[str], str] = (lambda path: "a path") if moved else os.path.realpath
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if _meant(name, before[name], place) != _meant(name, after[name], place)
        and not {name, name.split(".")[0]} & set(FREE)
    ]


def opened(config: Any) -> Any:
    """The config with its derived fields None again, for a parser to fill in; not checked until made anew."""
    copy = object.__new__(type(config))
    derived = vars(config).get("_derived", ())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = opened(value) if dataclasses.is_dataclass(value) else value
        object.__setattr__(copy, field.name, None if field.name in derived else value)
    return copy
