"""Draws the pictures of docs/tour.md into docs/tour/: `python scripts/draw_tour.py`. Masks are those of `sees`."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from transformer_jax import Tokens
from transformer_jax.model.attention import sees

FOLDER = Path(__file__).parent.parent / "docs" / "tour"
# Colours that can be read on white and on near-black alike.
LINE, SEEN, BLUE, GREEN, RED = "#7d8590", "#3b82c4", "#3b82c4", "#3f8f5f", "#b4573f"
FONT = 'font-family="ui-sans-serif, system-ui, sans-serif"'
CELL, MARGIN = 28, 44
WIDTH, STEP, BOTTOM = 170, 58, 284  # of a box, from box to box, of the lowest


def svg(width: float, height: float, about: str, parts: Sequence[str]) -> str:
    """A picture of its own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    return "\n".join([head, f"<title>{escape(about)}</title>", *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, size: int = 15, fill: str = LINE, anchor: str = "middle") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} {FONT} font-size="{size}" fill="{fill}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False) -> str:
    edge = f' stroke="{LINE}"' + (' stroke-dasharray="5 4"' if dashed else "") if fill == "none" else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"{edge}/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through points with a head at the last one."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = np.sign(x - x0), np.sign(y - y0)
    path = " ".join(f"{a:g},{b:g}" for a, b in points)
    head = [(x, y), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx)]
    corners = " ".join(f"{a:g},{b:g}" for a, b in head)
    return (
        f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        f'<polygon points="{corners}" fill="{LINE}"/>'
    )


def grid(x: float, name: str, rows: Sequence[str], columns: Sequence[str], mask: np.ndarray) -> list[str]:
    """A mask, queries below each other and keys side by side: what is seen is full."""
    left, top = x + MARGIN, 56
    parts = [text(left + len(columns) * CELL / 2, 20, name)]
    parts += [text(left + (j + 0.5) * CELL, top - 8, word, size=13) for j, word in enumerate(columns)]
    for i, word in enumerate(rows):
        parts.append(text(left - 8, top + (i + 0.68) * CELL, word, size=13, anchor="end"))
        for j in range(len(columns)):
            fill = SEEN if mask[i, j] else "none"
            parts.append(rectangle(left + j * CELL + 1.5, top + i * CELL + 1.5, CELL - 3, CELL - 3, fill))
    return parts


def masks(about: str, *grids: tuple[str, Sequence[str], Sequence[str], np.ndarray]) -> str:
    """Masks side by side."""
    parts, x, height = [], 0.0, 0.0
    for name, rows, columns, mask in grids:
        parts += grid(x, name, rows, columns, mask)
        x += MARGIN + max(len(columns), 5) * CELL + 14
        height = max(height, 64.0 + len(rows) * CELL)
    return svg(x, height, about, parts)


def see(q: Tokens, kv: Tokens | None = None, causal: bool = True, window: int = 0) -> np.ndarray:
    return np.asarray(sees(q, q if kv is None else kv, causal, window)[0])


BLOCK = [("self-attention", BLUE), ("cross-attention", RED), ("feed-forward", GREEN)]


def column(x: float, reads: str, parts: Sequence[tuple[str, str]], gone: Sequence[str] = ()) -> list[str]:
    """A stack, read from the bottom to the top; its layers are what is between embedding and output layer."""
    middle, top = x + WIDTH / 2, BOTTOM - STEP * sum(fill != LINE for _, fill in parts) - 12
    found = [rectangle(x - 12, top, WIDTH + 24, BOTTOM - 12 - top, "none", dashed=True)]
    found += [text(x + WIDTH + 18, top + 16, "× N", anchor="start"), text(middle, BOTTOM + 56, reads)]
    for number, (name, fill) in enumerate(parts):
        y, away = BOTTOM - number * STEP, name in gone
        found.append(rectangle(x, y, WIDTH, 34, "none" if away else fill, dashed=away))
        found.append(text(middle, y + 22, name, fill=LINE if away else "#ffffff"))
        if number + 1 < len(parts):
            found.append(arrow((middle, y), (middle, y - STEP + 34)))
    return found


def architecture(two: bool) -> str:
    """Encoder and decoder; or the decoder alone, with what it does without dashed."""
    decoder = [("embedding", LINE), *BLOCK, ("output layer", LINE)]
    parts, x, top = [], 310 if two else 40, BOTTOM - 4 * STEP
    if two:
        parts += column(20, "source ids [B, S]", [("embedding", LINE), BLOCK[0], BLOCK[2]])
        y = BOTTOM - 2 * STEP
        parts.append(arrow((105, y), (105, y - 46), (266, y - 46), (266, y + 17), (x, y + 17)))
        parts += [text(182, y - 54, "memory"), text(8, y - 20, "encoder", anchor="start")]
        parts.append(text(x + WIDTH + 10, top + 22, "decoder", anchor="start"))
        parts += column(x, "target ids [B, T]", decoder)
    else:
        parts += column(x, "source and target ids [B, T]", decoder, ["cross-attention"])
    parts += [arrow((x + 85, top), (x + 85, top - 24)), text(x + 85, top - 32, "logits [B, T, V]")]
    about = "An encoder-decoder" if two else "A decoder-only model"
    return svg(x + WIDTH + 72, BOTTOM + 70, about, parts)


def pictures() -> dict[str, str]:
    """The pictures by file name."""
    letters = ["a", "b", "c", "d", "e"]
    five = Tokens.from_ids(np.ones((1, 5), np.int32))
    packed = Tokens(np.ones((1, 6), np.int32), np.array([[1, 1, 1, 2, 2, 0]]), np.array([[0, 1, 2, 0, 1, 0]]))
    source = Tokens.from_ids(np.array([[5, 6, 7, 0]]), pad_id=0)
    joined = ["bos", "a", "b", "sep", "B", "A"]
    whole = Tokens.from_ids(np.ones((1, 6), np.int32))
    prefix = whole.replace(prefix=np.arange(6)[None] < 4)
    two = ["a", "b", "c", "p", "q", "pad"]
    return {
        "encoder-decoder.svg": architecture(two=True),
        "decoder-only.svg": architecture(two=False),
        "masks-self.svg": masks(
            "Masks of self-attention",
            ("encoder: both ways", letters, letters, see(five, causal=False)),
            ("decoder: causal", letters, letters, see(five)),
        ),
        "masks-more.svg": masks(
            "Masks of a packed row and of a window",
            ("two documents, padding", two, two, see(packed)),
            ("window of 3", letters, letters, see(five, window=3)),
        ),
        "masks-cross.svg": masks(
            "The mask of cross-attention",
            ("cross-attention", ["bos", "A", "B"], ["a", "b", "eos", "pad"], see(five, source, False)[:3]),
        ),
        "masks-joined.svg": masks(
            "Masks of a source and a target in one sequence",
            ("causal", joined, joined, see(whole)),
            ("prefix LM", joined, joined, see(prefix)),
        ),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
