"""Parts of pages that need nothing else: a style for light and dark, charts as SVG, tables.

Nothing of a page is fetched or run: what a chart has at a place is shown by the browser's own hints.
"""

import html
import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

COLOURS, DASHES = 6, ("", "6 3", "2 3")  # that lines differ by
MOST_LINES = COLOURS * len(DASHES)
MOST_POINTS = 120  # of a line, and places of a chart that tell their values
FEW_POINTS = 12  # are marked
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #5c5c5c; --band: .16;
  --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #c2255c; --c5: #0b7285; --good: #237a33; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --line: #3a3d44; --soft: #a8a8a8; --band: .25;
    --c0: #6ea8fe; --c1: #ff922b; --c2: #69db7c; --c3: #da77f2; --c4: #faa2c1; --c5: #3bc9db; --good: #69db7c; }
}
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p.answer { font-size: 1.15rem; border-left: 4px solid var(--c0); padding-left: .8rem; }
div.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.best { font-weight: 700; }
table.words th, table.words td { text-align: left; vertical-align: top; }
table.words { width: max-content; } table.words td { white-space: pre-wrap; max-width: 22rem; }
td.same { color: var(--good); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .95rem; } small { color: var(--soft); }
div.charts, div.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: 1.4rem 1rem; }
div.maps { grid-template-columns: repeat(auto-fill, minmax(min(14.5rem, 100%), 1fr)); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .at { fill: transparent; } svg .at:hover { fill: var(--ink); opacity: .09; }
.key { margin-right: 1em; }
.key svg { display: inline-block; width: 1.6em; height: .8em; margin-right: .4em; }
pre { white-space: pre-wrap; font-size: .9rem; } summary { cursor: pointer; padding: .3rem 0; }
details > summary { color: var(--soft); } li { margin: .15rem 0; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Line(NamedTuple):
    """Points of one arm: where, and the values of its seeds there."""

    name: str
    points: list[tuple[float, list[float]]]


def thinned(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, list[float]]]:
    """A long line's points, of neighbours one that has the values of all of them."""
    every = -(-len(xs) // MOST_POINTS) or 1
    parts = (slice(start, start + every) for start in range(0, len(xs), every))
    return [(statistics.fmean(xs[part]), list(ys[part])) for part in parts]


def look(number: int) -> str:
    """What the line of that number looks like, as SVG's attributes."""
    dash = DASHES[number // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'fill="none" stroke="var(--c{number % COLOURS})" stroke-width="2"{dashed}'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers between two."""
    if log:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**ten for ten in tens for factor in factors if low <= factor * 10.0**ten <= high]
            if len(found) <= 6:
                break
        if len(found) > 1:
            return found[:: -(-len(found) // 6)]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """A number of a few digits."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


LEFT, RIGHT, TOP, BOTTOM = 46, 334, 22, 192  # of what is drawn in a chart, whose axes' names are around it


def chart(title: str, across: str, up: str, lines: Sequence[Line], log: bool = False) -> str:
    """A line for each arm, the mean of its seeds, in a band from the least to the most of them.

    With `log` the axis upward is logarithmic, where all values are positive.
    """
    points = [(x, y) for line in lines for x, values in line.points for y in values]
    if not points:
        return ""
    log = log and all(1e-100 < y < 1e100 for _, y in points)
    scale = math.log10 if log else float
    (left, right), (low, high) = ((min(p[axis] for p in points), max(p[axis] for p in points)) for axis in (0, 1))
    left, bottom, top = min(left, 0.0), scale(low), scale(high)
    margin = 0.05 * (top - bottom) or abs(0.05 * top) or 1.0
    bottom, top = bottom - margin, top + margin

    def across_at(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - left) / (right - left or 1)

    def up_at(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (scale(y) - bottom) / (top - bottom)

    def place(x: float, y: float) -> str:
        return f"{across_at(x):.1f},{up_at(y):.1f}"

    parts = [f'<svg viewBox="0 0 350 232" role="img" aria-label="{html.escape(_told(title, across, lines))}">']
    for tick in _ticks(*((10**bottom, 10**top) if log else (bottom, top)), log):
        y = f"{up_at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(left, right, False) if right > left else [left]:
        parts.append(f'<text x="{across_at(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    for number, line in enumerate(lines):
        upper = [place(x, max(values)) for x, values in line.points]
        lower = [place(x, min(values)) for x, values in reversed(line.points)]
        mean, drawn = [place(x, statistics.fmean(values)) for x, values in line.points], look(number)
        if any(len(values) > 1 for _, values in line.points):
            band = f'fill="var(--c{number % COLOURS})" style="opacity: var(--band)"'
            parts.append(f'<polygon points="{" ".join(upper + lower)}" {band}/>')
        parts.append(f'<polyline points="{" ".join(mean)}" {drawn}/>')
        if len(mean) <= FEW_POINTS:
            at = (each.split(",") for each in mean)
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="var(--c{number % COLOURS})"/>' for x, y in at]
    for start, end, told in _places(across, lines):
        x, wide = (across_at(max(start, left)), across_at(min(end, right)) - across_at(max(start, left)))
        box = f'x="{x:.1f}" y="{TOP}" width="{max(wide, 1):.1f}" height="{BOTTOM - TOP}"'
        parts.append(f'<rect class="at" {box}><title>{html.escape(told)}</title></rect>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="226" text-anchor="middle">{html.escape(across)}</text>')
    up = ", ".join(filter(None, [up, "log scale" if log else ""]))
    parts.append(f'<text x="4" y="13">{html.escape(up)}</text></svg>')
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</figure>"


def _told(title: str, across: str, lines: Sequence[Line]) -> str:
    """A chart in words."""
    ends = [
        f"{line.name}, from {short(statistics.fmean(line.points[0][1]))} at {short(line.points[0][0])} {across}"
        f" to {short(statistics.fmean(line.points[-1][1]))} at {short(line.points[-1][0])}"
        for line in lines
        if line.points
    ]
    return f"{title}: {'; '.join(ends)}"


def _places(across: str, lines: Sequence[Line]) -> list[tuple[float, float, str]]:
    """(from, to, what the lines have there) of parts of a chart, side by side."""
    xs = sorted({x for line in lines for x, _ in line.points})
    xs = xs[:: -(-len(xs) // MOST_POINTS)]
    edges = [-math.inf, *((one + other) / 2 for one, other in itertools.pairwise(xs)), math.inf]
    told: list[list[str]] = [[] for _ in xs]
    for line in lines:
        found: dict[int, list[float]] = {}
        for x, values in line.points:
            found.setdefault(max(bisect_left(edges, x) - 1, 0), []).extend(values)
        for part, values in found.items():
            text = short(statistics.fmean(values))
            spread = f" ({short(min(values))} to {short(max(values))})" if len(values) > 1 else ""
            told[part].append(f"{line.name}: {text}{spread}")
    starts = zip(edges, edges[1:], xs, told, strict=False)
    return [(start, end, "\n".join([f"{short(x)} {across}", *texts])) for start, end, x, texts in starts if texts]


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


def table(columns: Sequence[Column], arms: Sequence[str], what: str = "arm", missing: str = "failed") -> str:
    """A row for each arm; the best of a column is bold."""
    best = {}
    for column in columns:
        means = {arm: statistics.fmean(values) for arm, values in column.values.items() if values}
        if column.more is not None and len(means) > 1:
            best[column.name] = (max if column.more else min)(means, key=lambda arm: means[arm])
    rows = [f"<tr><th>{what}</th>" + "".join(f"<th>{html.escape(column.name)}</th>" for column in columns) + "</tr>"]
    for number, arm in enumerate(arms):
        cells = [f"<td>{_key(number, arm) if len(arms) > 1 else html.escape(arm)}</td>"]
        for column in columns:
            values = column.values.get(arm, [])
            mark = ' class="best"' if best.get(column.name) == arm else ""
            cells.append(f"<td{mark}>{spread(values, column.show) if values else missing}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return wide(f"<table>{''.join(rows)}</table>", "Numbers")


def words(heads: Sequence[str], rows: Sequence[Sequence[str]], same: Sequence[int] = ()) -> str:
    """A table of texts; rows of those numbers are marked."""
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    for number, row in enumerate(rows):
        mark = ' class="same"' if number in same else ""
        lines.append("".join(f'<td{mark} dir="auto">{html.escape(cell)}</td>' for cell in row))
    return wide(f'<table class="words">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>', ", ".join(heads))


def wide(inner: str, label: str) -> str:
    """What may be wider than the page, in a box of its own that scrolls."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{html.escape(label)}">{inner}</div>'


def folded(summary: str, inner: str, opened: bool = False) -> str:
    """What is shown on demand, or can be hidden."""
    return f"<details{' open' * opened}><summary>{html.escape(summary)}</summary>{inner}</details>" if inner else ""


def _key(number: int, name: str) -> str:
    line = f'<svg viewBox="0 0 32 16" aria-hidden="true"><path d="M0 8H32" {look(number)}/></svg>'
    return f'<span class="key">{line}{html.escape(name)}</span>'


def key_of(names: Sequence[str]) -> str:
    """Which line of the charts is whose."""
    return " ".join(_key(number, name) for number, name in enumerate(names))


def document(title: str, body: str) -> str:
    """A whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>
{body}
</main></body></html>
"""
