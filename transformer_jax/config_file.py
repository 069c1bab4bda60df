"""Configs <-> JSON and plain dicts, and what differs between two of them."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from transformer_jax.config import RunConfig
from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError

# What a run may change without becoming another run: where and how often, not what is computed.
FREE = (
    "recipe",
    "workdir",
    "eval_every",
    "eval_rows",
    "log_every",
    "num_samples",
    "max_new_tokens",
    "stop_at",
    "stop_after",
    "parallel",
    "checkpoint",
    "model.remat",
)


def to_json(config: RunConfig) -> str:
    """The whole config as JSON, one field a line, but for which of several processes this is."""
    parallel = dataclasses.replace(config.parallel, coordinator="", num_processes=None, process_id=None)
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, parallel=parallel)), indent=2) + "\n"


def _from_dict(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with the fields of {kind.__name__}; got {str(values)[:80]}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"{where}: unknown field {name!r}.{nearest(name, hints)}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _from_dict(hints[name], value, f"{where}, {name}")
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the field {name!r} is given more than once")
    return dict(pairs)


def read_config(path: str | Path) -> RunConfig:
    """The run's settings in a `config.json`.

    Raises:
        InputError: the file is missing, is not JSON, or has an unknown field or a wrong value.
    """
    try:
        text = Path(path).read_text("utf-8")
        values = json.loads(text, object_pairs_hook=_no_twins)
    except OSError as error:
        raise InputError(f"{path}: the config cannot be read ({error.strerror}).") from None
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


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`model.num_layers: 6 -> 4` for each field that makes the second another run than the first."""
    before, after = flat(old), flat(new)
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and not {name, name.split(".")[0]} & set(FREE)
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
