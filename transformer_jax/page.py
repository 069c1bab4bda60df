"""Parts of pages that need nothing else: a style for light and dark, charts as SVG, tables."""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

COLOURS = ("#2f6fed", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #666; --band: .16; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --line: #3a3d44; --soft: #a0a0a0; --band: .25; }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.answer { font-size: 1.15rem; border-left: 4px solid #2f6fed; padding-left: .8rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
figure { margin: 1rem 0; } figcaption, small { color: var(--soft); }
div.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; } svg .grid { stroke: var(--line); }
i.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
"""


class Line(NamedTuple):
    """Points of one arm: where, and the values of its seeds there."""

    name: str
    points: list[tuple[float, list[float]]]


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers between two."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 4)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """A number of a few digits."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def chart(title: str, across: str, up: str, lines: Sequence[Line]) -> str:
    """A line for each arm, the mean of its seeds, in a band from the least to the most of them."""
    points = [(x, y) for line in lines for x, values in line.points for y in values]
    if not points:
        return ""
    (left, right), (low, high) = ((min(p[axis] for p in points), max(p[axis] for p in points)) for axis in (0, 1))
    left, high, low = min(left, 0.0), high + 0.05 * (high - low or 1), low - 0.05 * (high - low or 1)

    def place(x: float, y: float) -> str:
        return f"{46 + 294 * (x - left) / (right - left or 1):.1f},{190 - 170 * (y - low) / (high - low):.1f}"

    parts = [f'<svg viewBox="0 0 350 232" role="img" aria-label="{html.escape(title)}">']
    for tick in _ticks(low, high):
        x, y = place(left, tick).split(",")
        parts.append(f'<line class="grid" x1="{x}" x2="340" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="42" y="{float(y) + 4}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(left, right):
        x = place(tick, low).split(",")[0]
        parts.append(f'<text x="{x}" y="205" text-anchor="middle">{short(tick)}</text>')
    for colour, line in zip(COLOURS, lines, strict=False):
        upper = [place(x, max(values)) for x, values in line.points]
        lower = [place(x, min(values)) for x, values in reversed(line.points)]
        mean = " ".join(place(x, statistics.fmean(values)) for x, values in line.points)
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" style="opacity: var(--band)"/>')
        parts.append(f'<polyline points="{mean}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append(f'<text x="193" y="224" text-anchor="middle">{html.escape(across)}</text>')
    parts.append(f'<text x="4" y="12">{html.escape(up)}</text></svg>')
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(title)}</figcaption></figure>"


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and half of what lies between the least and the most."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.fmean(values))} ± {show((max(values) - min(values)) / 2)}"


class Column(NamedTuple):
    """A number of each arm: its heading, how it is shown, and whether more is better (None: neither)."""

    name: str
    values: dict[str, list[float]]
    show: Callable[[float], str]
    more: bool | None


def table(columns: Sequence[Column], arms: Sequence[str]) -> str:
    """A row for each arm; the best of a column is bold."""
    best = {}
    for column in columns:
        means = {arm: statistics.fmean(values) for arm, values in column.values.items() if values}
        if column.more is not None and means:
            best[column.name] = (max if column.more else min)(means, key=lambda arm: means[arm])
    rows = ["<tr><th>arm</th>" + "".join(f"<th>{html.escape(column.name)}</th>" for column in columns) + "</tr>"]
    for colour, arm in zip(COLOURS, arms, strict=False):
        cells = [f'<td><i class="key" style="background: {colour}"></i>{html.escape(arm)}</td>']
        for column in columns:
            values = column.values.get(arm, [])
            mark = ' class="best"' if best.get(column.name) == arm else ""
            cells.append(f"<td{mark}>{spread(values, column.show) if values else 'failed'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def key_of(names: Sequence[str]) -> str:
    """Which colour of the charts is whose."""
    return " ".join(
        f'<span><i class="key" style="background: {colour}"></i>{html.escape(name)}</span>'
        for colour, name in zip(COLOURS, names, strict=False)
    )


def document(title: str, body: str) -> str:
    """A whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""
