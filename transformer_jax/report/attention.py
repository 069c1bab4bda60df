"""A run's folder and a text -> where its heads look: a picture of each head as SVG, each query's keys as a hint."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from transformer_jax.errors import CheckpointError, InputError
from transformer_jax.files import decode
from transformer_jax.page import folded
from transformer_jax.pictures import Maps, look, shown, width
from transformer_jax.report.history import History
from transformer_jax.report.samples import first_prompt
from transformer_jax.run import load_run

INK, UNSEEN = (59, 130, 246), (128, 128, 128, 56)  # as both light and dark paper can have them
CELL, TYPE = (5.0, 16.0), 9.0  # a token's least and most, and the height of type; the map has about SIDE
SIDE = 260.0
LETTERS = 48  # of a sample that is looked at
LEGEND = """Each row is a token that asks (query), each column one that it takes from (key). The fuller the colour, the
more it takes: its strength is the root of the share. Grey is out of its sight."""


def _png(weights_TS: np.ndarray) -> str:
    """A pixel for each weight, as a data URI; a weight of exactly 0 is a key that its query does not see."""
    from matplotlib.image import imsave

    pixels = np.zeros((*weights_TS.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = INK, np.round(255 * np.sqrt(np.clip(weights_TS, 0, 1)))
    pixels[weights_TS == 0] = UNSEEN
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _most(weights_S: np.ndarray, keys: Sequence[str]) -> str:
    """The keys that a query takes most from."""
    first = np.argsort(-weights_S, kind="stable")[:3]
    return ", ".join(f"{keys[place]} {weights_S[place]:.0%}" for place in first if weights_S[place] >= 0.005)


def picture(weights_TS: np.ndarray, queries: Sequence[str], keys: Sequence[str], title: str) -> str:
    """One map with its labels."""
    (T, S), type_in = weights_TS.shape, TYPE
    cell = min(max(SIDE / max(T, S), CELL[0]), CELL[1])
    type_in = min(TYPE, cell + 1)
    left = max(width(label, type_in) for label in queries) + 8
    below = 1.2 * max(width(label, type_in) for label in keys) + 8
    wide, tall = left + S * cell + 2, 16 + T * cell + below
    style = f'style="font-size: {type_in:.1f}px"'
    parts = [
        f'<svg viewBox="0 0 {wide:.1f} {tall:.1f}" style="max-width: {1.15 * wide:.0f}px" role="img" '
        f'aria-label="{html.escape(title)}">',
        f'<text x="{left:.1f}" y="11">{html.escape(title)}</text>',
        f'<image x="{left:.1f}" y="16" width="{S * cell:.1f}" height="{T * cell:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="{_png(weights_TS)}"/>',
        f'<rect x="{left:.1f}" y="16" width="{S * cell:.1f}" height="{T * cell:.1f}" fill="none" '
        'stroke="var(--line)"/>',
    ]
    for row, label in enumerate(queries):
        y, told = 16 + row * cell, f"{label} takes from: {_most(weights_TS[row], keys)}"
        at = f'x="{left - 4:.1f}" y="{y + cell / 2 + type_in / 3:.1f}"'
        parts.append(f'<text {at} text-anchor="end" {style}>{html.escape(label)}</text>')
        box = f'x="{left:.1f}" y="{y:.1f}" width="{S * cell:.1f}" height="{cell:.1f}"'
        parts.append(f'<rect class="at" {box}><title>{html.escape(told)}</title></rect>')
    for column, label in enumerate(keys):
        x, y = left + (column + 0.5) * cell + type_in / 3, 16 + T * cell + 4
        turned = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" {turned} {style}>{html.escape(label)}</text>')
    return f"{''.join(parts)}</svg>"


def draw(every: Sequence[Maps]) -> str:
    """All maps; of each kind the last layer is open."""
    parts = [f"<p><small>{LEGEND}</small></p>"]
    for maps in every:
        maps, title = shown(maps, {})
        N, H = maps.weights_NHTS.shape[:2]
        parts.append(f"<h3>{html.escape(title)}</h3>")
        for layer in range(N):
            heads = [
                picture(maps.weights_NHTS[layer, head], maps.queries, maps.keys, f"layer {layer}, head {head}")
                for head in range(H)
            ]
            parts.append(folded(f"layer {layer}", f'<div class="maps">{"".join(heads)}</div>', layer == N - 1))
    return "".join(parts)


def attention_of(folder: str, history: History, prompt: str | None) -> tuple[str, str]:
    """(what was asked, its maps as HTML), or ("", why there are none). Without a prompt it is that of the first sample.

    Raises:
        InputError: the prompt is given, and the run cannot read it.
    """
    asked = first_prompt(history)[:LETTERS]
    if prompt is not None:
        asked = decode("--prompt", prompt.encode(errors="surrogateescape"))
    elif not asked.strip():
        return "", "There is no sample yet whose attention could be shown; --prompt TEXT chooses a text."
    try:
        run = load_run(folder)
    except (InputError, CheckpointError) as error:
        return "", str(error)
    try:
        return f"{asked!r}, at step {run.step}", draw(look(run, asked))
    except InputError as error:
        if prompt is not None:
            raise
        return "", str(error)
