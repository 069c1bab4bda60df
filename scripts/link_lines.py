"""Keeps docs true: `python scripts/link_lines.py` rewrites line numbers of links to code, and figures of measurements.

    [text](https://github.com/transformer-jax/transformer_jax/blob/main/PATH#L1-L2 "SYMBOL")
    14.9<!-- docs/bench-jit.json: cases/decoder-only/ways/no jit/spread -->

SYMBOL is a name such as `Attention.__call__`, `NORMS` or `__doc__`; or `NAME: text`, the statement or the line of NAME
that has this text in its first line. A figure is a number of a JSON file, by the names on the way to it, perhaps `over`
another one, perhaps `times` a factor, rounded as it is written; or, of another file, a word of the one line that has a
text. Pages are README.md, CONTRIBUTING.md and those of docs/.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CODE = "https://github.com/transformer-jax/transformer_jax/blob/main/"
LINK = re.compile(rf'\]\({re.escape(CODE)}(?P<path>[^)#\s]+)(?P<lines>#[^)\s]*)?(?: "(?P<symbol>[^"]*)")?\)')
FIGURE = re.compile(r"(?P<number>[\d,]*\.?\d+)(?P<unit>[^\S\n]?%)?<!-- (?P<path>[\w./-]+): (?P<what>[^\n]+?) -->")


def pages() -> list[Path]:
    """The Markdown files that people read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _names(node: ast.AST) -> list[str]:
    """What a statement gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for each in targets if isinstance(each, ast.Name)]


def _span(node: ast.AST) -> tuple[int, int]:
    """First and last line of a statement, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first, last = (int(getattr(node, name)) for name in ("lineno", "end_lineno"))
    return min([first, *(each.lineno for each in decorators)]), last


def lines_of(source: str, symbol: str) -> tuple[int, int]:
    """First and last line, from 1, of a symbol of a Python file.

    Raises:
        ValueError: there is none, or there are several.
    """
    name, _, text = symbol.partition(": ")
    node: Any = ast.parse(source)
    for part in [] if name == "__doc__" else name.split("."):
        found = [each for each in getattr(node, "body", []) if part in _names(each)]
        if len(found) != 1:
            raise ValueError(f"{symbol!r}: {len(found)} statements are named {part!r}")
        node = found[0]
    first, last = _span(node.body[0] if name == "__doc__" else node)
    if not text:
        return first, last
    rows = source.splitlines()
    places = [number for number in range(first, last + 1) if text in rows[number - 1]]
    if len(places) != 1:
        raise ValueError(f"{symbol!r}: {len(places)} lines of {name} have {text!r}")
    spans = [_span(each) for each in ast.walk(node) if isinstance(each, ast.stmt) and each.lineno == places[0]]
    return min(spans, default=(places[0], places[0]))


def _number(path: str, names: str) -> float:
    value = json.loads((ROOT / path).read_text(encoding="utf-8"))
    for name in names.split("/"):
        value = value[name]
    return float(value)


def figure(number: str, path: str, what: str) -> str:
    """A number as it is written, made that of the file.

    Raises:
        ValueError: the file says no such thing.
    """
    if not path.endswith(".json"):
        lines = [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if what in line]
        if len(lines) != 1 or not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", lines[0]):
            raise ValueError(f"{path} does not say {number} in one line that has {what!r}")
        return number
    what, _, factor = what.partition(" times ")
    first, _, second = what.partition(" over ")
    try:
        value = _number(path, first) * float(factor or 1) / (_number(path, second) if second else 1)
    except KeyError as error:
        raise ValueError(f"{path} has no {what!r}: {error} is missing") from error
    return f"{value:,.{len(number.partition('.')[2])}f}"


def rewritten(page: str) -> str:
    """A page with the line numbers and the figures of today.

    Raises:
        ValueError: a link names no symbol, or a symbol or a figure that is not there.
    """

    def link(match: re.Match[str]) -> str:
        path, symbol = match["path"], match["symbol"]
        if not (ROOT / path).is_file():
            raise ValueError(f"{path} is linked to, and is no file")
        if not path.endswith(".py"):
            return match[0]
        if not symbol:
            raise ValueError(f"a link to {path} does not name a symbol")
        try:
            first, last = lines_of((ROOT / path).read_text(encoding="utf-8"), symbol)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        lines = f"#L{first}" if first == last else f"#L{first}-L{last}"
        return f']({CODE}{path}{lines} "{symbol}")'

    def measured(match: re.Match[str]) -> str:
        number, path, what = figure(match["number"], match["path"], match["what"]), match["path"], match["what"]
        return f"{number}{match['unit'] or ''}<!-- {path}: {what} -->"

    return FIGURE.sub(measured, LINK.sub(link, page))


def main() -> None:
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
