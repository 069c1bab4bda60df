"""What `samples.txt` holds -> tables: of pairs source, expected and output; of other texts as they are written."""

import html
import re

from transformer_jax.page import folded, words
from transformer_jax.report.history import History

EARLIER = 20  # evaluations whose samples are shown besides the last one's
PAIR = re.compile(r"(?P<source>.*?)\n  expected (?P<expected>.*?)\n  output   (?P<output>[^\n]*)(?:\n|\Z)", re.DOTALL)


def pairs_in(text: str) -> list[tuple[str, str, str]]:
    """(source, expected, output) of each pair, or none where the text is not all of pairs."""
    found = [(*match.group("source", "expected", "output"), match.end()) for match in PAIR.finditer(text)]
    whole = found and found[-1][3] == len(text)
    return [(source, expected, output) for source, expected, output, _ in found] if whole else []


def first_prompt(history: History) -> str:
    """What the first sample of the last evaluation was asked; nothing where there is none."""
    text = history.samples[-1][1] if history.samples else ""
    pairs = pairs_in(text)
    return pairs[0][0] if pairs else text.partition("\n  output   ")[0].partition("|")[0]


def shown(text: str) -> str:
    """The samples of one evaluation."""
    pairs = pairs_in(text)
    if not pairs:
        return f'<pre dir="auto">{html.escape(text)}</pre>'
    right = [number for number, (_, expected, output) in enumerate(pairs) if expected == output]
    return words(("source", "expected", "output"), pairs, right)


def samples_of(history: History) -> str:
    """The last evaluation's, and earlier ones on demand."""
    if not history.samples:
        return "<p>None yet.</p>"
    *earlier, (step, text) = history.samples
    right = "; green is right to the letter" if pairs_in(text) else ""
    parts = [f"<p>At step {step:,}{right}.</p>", shown(text)]
    parts += [folded(f"step {step:,}", shown(text)) for step, text in reversed(earlier[-EARLIER:])]
    return "".join(parts)
