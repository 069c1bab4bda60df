"""Writes transformer_jax/data/dates.json, the frozen table of names and date patterns from CLDR.

A maintainer runs it once, and again only to take a newer CLDR (which changes the dataset):

    pip install babel
    python scripts/make_dates.py --out transformer_jax/data/dates.json

The package itself never imports Babel. Source: the Unicode CLDR as Babel packages it, under the Unicode
License V3 (transformer_jax/data/LICENSE-unicode.txt).
"""

import argparse
import json
import re
from pathlib import Path

import babel
from babel.core import get_cldr_version

# Gregorian calendars written with Western digits, in Latin, Cyrillic, Greek, Devanagari, Han, kana and Hangul
# script. Croatian stays out: its "listopad" is October where the Polish and Czech one is November.
LOCALES = [
    "en_US",
    "en_GB",
    "de",
    "fr",
    "es",
    "it",
    "pt",
    "nl",
    "sv",
    "da",
    "nb",
    "fi",
    "pl",
    "cs",
    "hu",
    "ro",
    "tr",
    "id",
    "vi",
    "ru",
    "uk",
    "el",
    "hi",
    "ja",
    "zh",
    "ko",
]
STANDARD = ("full", "long", "medium")
SKELETONS = ("yMMMd", "yMMMEd", "yMMMMd", "yMMMMEd", "yMMMMEEEEd")
FIELD = re.compile(r"''|'[^']*'|([a-zA-Z])\1*")
RENDERED = {"y", "M", "MM", "MMM", "MMMM", "L", "LL", "LLL", "LLLL", "d", "dd", "E", "EEE", "EEEE", "ccc", "cccc"}
MONTHS = {"MMM": ("format", "abbreviated"), "MMMM": ("format", "wide")}
MONTHS |= {"LLL": ("stand-alone", "abbreviated"), "LLLL": ("stand-alone", "wide")}
DAYS = {"EEE": ("format", "abbreviated"), "EEEE": ("format", "wide")}
DAYS |= {"ccc": ("stand-alone", "abbreviated"), "cccc": ("stand-alone", "wide")}


def fields(pattern: str) -> list[str]:
    """Returns the CLDR fields of a pattern in order, without its quoted literals."""
    return [match[0] for match in FIELD.finditer(pattern) if match[1]]


def recoverable(pattern: str) -> bool:
    """Says whether day, month and four-digit year can be read back from any text of this pattern.

    The month must be a name, or the order must be year, month, day: 3/4/2020 may be either of two dates,
    2020/3/4 is one.
    """
    found = fields(pattern)
    if not set(found) <= RENDERED or "y" not in found or not {"d", "dd"} & set(found):
        return False
    order = "".join(field[0] for field in found if field[0] in "yMLd").replace("L", "M")
    return order == "yMd" or bool(set(MONTHS) & set(found))


def entry(name: str) -> dict[str, object]:
    """Returns one locale's row: names by CLDR field (12 months, 7 days from Monday) and its patterns."""
    locale = babel.Locale.parse(name)
    candidates = [locale.date_formats[key].pattern for key in STANDARD]
    skeletons = locale.datetime_skeletons
    candidates += [skeletons[key].pattern for key in SKELETONS if key in skeletons]
    patterns = list(dict.fromkeys(pattern for pattern in candidates if recoverable(pattern)))
    used = {field for pattern in patterns for field in fields(pattern)} | {"MMM", "MMMM", "EEE", "EEEE"}
    names = {key: [locale.months[a][b][i] for i in range(1, 13)] for key, (a, b) in MONTHS.items() if key in used}
    names |= {key: [locale.days[a][b][i] for i in range(7)] for key, (a, b) in DAYS.items() if key in used}
    return {"names": names, "patterns": patterns}


def main() -> None:
    """Writes the table, one locale to a line so that a newer CLDR shows as a readable diff."""
    parser = argparse.ArgumentParser(description="Freeze CLDR date names and patterns into a JSON table.")
    parser.add_argument("--out", type=Path, default=Path("transformer_jax/data/dates.json"))
    out: Path = parser.parse_args().out
    rows = [f'    "{name}": {json.dumps(entry(name), ensure_ascii=False)}' for name in LOCALES]
    source = {"cldr": get_cldr_version(), "babel": babel.__version__}
    licence = "Unicode-3.0; the notice is LICENSE-unicode.txt beside this file"
    head = f'  "source": {json.dumps(source)},\n  "licence": {json.dumps(licence)},\n'
    out.write_text("{\n" + head + '  "locales": {\n' + ",\n".join(rows) + "\n  }\n}\n", encoding="utf-8")
    print(f"{out}: {len(rows)} locales, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
