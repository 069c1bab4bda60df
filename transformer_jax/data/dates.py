"""Dates written in many languages, paired with the same dates in ISO 8601.

In comes a date as people write it, in one of the locales and patterns of dates.json: "Thursday, April 2,
2020", "2 avril 2020", "2020年4月2日(木)". Out comes, and the model must write, ISO 8601: "2020-04-02".

The split is by date, not by text: a validation or test date is never seen in training in any locale, so a
model scores only by reading day, month and year, not by remembering dates. A weekday, where a pattern has
one, adds nothing.

The names and patterns are the Unicode CLDR's (LICENSE-unicode.txt), frozen so that the data needs no download
and is the same on every machine.
"""

import datetime
import hashlib
import json
import re
from importlib.resources import files
from typing import TypedDict

import numpy as np

SPLITS = ("train", "validation", "test")
FIRST = datetime.date(1900, 1, 1)
LAST = datetime.date(2099, 12, 31)


class Locale(TypedDict):
    """One locale's names by CLDR field (12 months, or 7 days from Monday) and its date patterns."""

    names: dict[str, list[str]]
    patterns: list[str]


_TABLE = files("transformer_jax.data").joinpath("dates.json").read_text(encoding="utf-8")
LOCALES: dict[str, Locale] = json.loads(_TABLE)["locales"]
FORMATS = [(locale, pattern) for locale, row in LOCALES.items() for pattern in row["patterns"]]

# A quoted literal, or a run of one ASCII letter, which CLDR reads as a field; all else stands for itself.
_TOKEN = re.compile(r"''|'([^']*)'|([a-zA-Z])\2*")


def _field(field: str, date: datetime.date, names: dict[str, list[str]]) -> str:
    """Returns the text of one CLDR field; ValueError for a field that the table does not use."""
    if field == "y":
        return str(date.year)
    if field in ("d", "dd"):
        return str(date.day).zfill(len(field))
    if field in ("M", "MM", "L", "LL"):
        return str(date.month).zfill(len(field))
    key = "EEE" if field in ("E", "EE") else field  # CLDR: one to three letters are the abbreviated name
    if key not in names:
        raise ValueError(f"the date table has no names for the field {field!r}")
    return names[key][date.weekday() if key[0] in "Ec" else date.month - 1]


def render(date: datetime.date, locale: str, pattern: str) -> str:
    """Writes a date in a locale by a CLDR pattern such as "EEEE, d MMMM y".

    Knows y, M to MMMM, L to LLLL, d, dd, E to EEEE, ccc, cccc and quoted literals, as far as the locale's
    patterns need them; ValueError for another field or locale. Source: Unicode Technical Standard 35, part 4,
    "Date Format Patterns".
    """
    if locale not in LOCALES:
        raise ValueError(f"unknown locale {locale!r}; the table has {', '.join(LOCALES)}")
    names = LOCALES[locale]["names"]

    def fill(token: re.Match[str]) -> str:
        return _field(token[0], date, names) if token[2] else token[1] or "'"

    return _TOKEN.sub(fill, pattern)


def split_of(date: datetime.date) -> str:
    """Returns the split that owns a date, by a hash of its ordinal: 80 % train, 10 % each of the others."""
    digest = hashlib.blake2b(date.toordinal().to_bytes(4, "big"), digest_size=8).digest()
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest, "big") % 10, "train")


def pairs(split: str, count: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """Returns (source text, ISO date) pairs, each date of the split once, in random order and format.

    There are about 58,000 in "train" and 7,300 each in "validation" and "test"; count takes the first ones.
    The seed, zero or more, draws the order and each date's (locale, pattern); it never moves a date to
    another split. ValueError for an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if count is not None and count < 0:
        raise ValueError(f"count must be zero or more, not {count}")
    days = map(datetime.date.fromordinal, range(FIRST.toordinal(), LAST.toordinal() + 1))
    owned = [day for day in days if split_of(day) == split]
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    # Only uniform doubles are drawn: NumPy may change how permutation or integers use the bit stream.
    order = np.argsort(rng.random(len(owned)), kind="stable")
    formats = (rng.random(len(owned)) * len(FORMATS)).astype(np.int64)
    drawn = [(owned[i], FORMATS[j]) for i, j in zip(order[:count], formats[:count], strict=True)]
    return [(render(day, locale, pattern), day.isoformat()) for day, (locale, pattern) in drawn]


_ENGLISH = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def baseline(text: str) -> str:
    """Reads a date by the rule one writes first: a year, an English month or a number for it, then the day.

    The floor that a trained model has to beat. Returns text of the form YYYY-MM-DD: a missing part becomes
    2000, 01 or 01, and a number above 12 may stand as the month.
    """
    year = re.search(r"\d{4}", text)
    numbers = [int(number) for number in re.findall(r"(?<!\d)\d{1,2}(?!\d)", text)]
    words = re.findall(rf"\b({'|'.join(_ENGLISH)})", text.lower())
    # The last such word: a weekday comes before the month, and "mar." is also Tuesday in Romance languages.
    month = _ENGLISH.index(words[-1]) + 1 if words else numbers.pop(0) if len(numbers) > 1 else 1
    day = numbers[0] if numbers else 1
    return f"{year[0] if year else '2000'}-{month:02d}-{day:02d}"
