"""Flags -> a dataclass of settings, each checked."""

import itertools
from pathlib import Path
from typing import Annotated, Any

import tyro

from transformer_jax.config_checks import misfit, shown, types_of
from transformer_jax.errors import InputError

RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def _check_words(kind: type, arguments: list[str], switches: bool) -> None:
    """Raises InputError for a word that its flag cannot take, with the nearest that it can."""
    known = {name: hint for name, hint in types_of(kind).items() if not (switches and hint is bool)}
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        name, value = flag[2:].replace("-", "_"), value if equals else following
        given = flag.startswith("--") and name in known and value and not value.startswith("--")
        if given and (why := misfit(value, known[name])):
            raise InputError(f"{flag} {shown(value)} {why}")


def parse(
    kind: Any, prog: str, arguments: list[str], description: str, default: Any = None, switches: bool = False
) -> Any:
    """The settings that a command line gives. What is wrong ends the process with status 2, or raises InputError.

    A setting that is true or false takes that word; with `switches` its flag alone is true.
    """
    _check_words(kind, arguments, switches)
    options = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=prog,
        args=arguments,
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff if switches else tyro.conf.FlagConversionOff),
        **options,
    )


def papers(folder: str) -> list[Path]:
    """The files of a run that no output may replace."""
    return [path for path in Path(folder).iterdir() if path.is_file()]
