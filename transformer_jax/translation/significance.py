"""Which of two outputs for the same sources is better, or that nothing can be said: `transformer-jax significance`.

It compares files, one output a line, as `evaluate --output` and `generate --output` write them: outputs are decoded
once, each in its own way, whatever is asked of them later; and those of any other system can be compared too.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer_jax import host
from transformer_jax.config_checks import at_least, at_most
from transformer_jax.errors import InputError
from transformer_jax.files import lines_of
from transformer_jax.flags import parse
from transformer_jax.translation.scores import Measure, measures

LEVEL = 0.05
BYTES = 4 * 24  # that sacreBLEU holds of each line in each sample, at most


@dataclasses.dataclass(frozen=True)
class SignificanceArguments:
    reference: Path
    """The targets, one a line."""
    outputs: tuple[Path, ...]
    """Two files of outputs, one a line."""
    samples: int = 1000
    """Test sets that are drawn."""
    seed: int = 12345
    """Of the drawing."""
    tokenized_bleu: str = ""
    """Compare BLEU of lower-cased tokens too: of Moses's for this language (de, en, ...), or none: of lines as they
    are."""

    def __post_init__(self) -> None:
        if len(self.outputs) != 2:
            raise ValueError(f"--outputs takes two files; got {len(self.outputs)}.")
        at_least(self, 100, "samples")
        at_least(self, 1, "seed")  # sacreBLEU takes 0 for none
        at_most(self, 2**32 - 1, "seed")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sacreBLEU reads its seed from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        del os.environ["SACREBLEU_SEED"]
        if before is not None:
            os.environ["SACREBLEU_SEED"] = before


def paired_bootstrap(
    first: list[str], second: list[str], targets: list[str], measure: Measure, samples: int = 1000, seed: int = 12345
) -> dict[str, Any]:
    """The paired bootstrap (Koehn 2004), by sacreBLEU: the score on test sets drawn from this one with replacement.

    Returns:
        `scores` of the two; `intervals` that hold 95 % of the drawn scores of each; `p_value`, how often a difference
        as large as theirs comes about by the choice of the lines alone; `better`, 1 or 2, or None where that is more
        than 5 % and nothing can be said; the `signature`.

    Where m lines differ, either output of each may as well be the other's, so `p_value` is at least 2 ** (1 - m): of
    equal scores it is 1. The drawing alone, where it finds one and the same difference each time, would have it 0.
    """
    from sacrebleu.significance import PairedTest

    texts = [list(map(measure.prepare, each)) for each in (first, second, targets)]
    with _seeded(seed):
        test = PairedTest([("1", texts[0]), ("2", texts[1])], {"": measure.metric}, [texts[2]], "bs", samples)
        signatures, found = test()
    (name, signature), *_ = signatures.items()
    results: Any = found[name]
    differ = sum(one != other for one, other in zip(texts[0], texts[1], strict=True))
    scores = [float(result.score) for result in results]
    p_value = 1.0 if scores[0] == scores[1] else max(float(results[1].p_value), min(1.0, 2.0 ** (1 - differ)))
    return {
        "scores": scores,
        "intervals": [[float(each.mean - each.ci), float(each.mean + each.ci)] for each in results],
        "p_value": p_value,
        "better": (1 if scores[0] > scores[1] else 2) if p_value <= LEVEL else None,
        "signature": measure.sign(str(signature)),
    }


def _read(reference: Path, outputs: tuple[Path, ...], samples: int) -> list[list[str]]:
    """Lines of the outputs and of the reference, as many of each."""
    texts = [list(lines_of(path)) for path in (*outputs, reference)]
    for path, lines in zip(outputs, texts):
        if len(lines) != len(texts[-1]):
            raise InputError(f"{path}: {len(lines):,} lines, and {reference} has {len(texts[-1]):,}.")
    need, memory = BYTES * samples * len(texts[-1]), host.memory() or 2**36
    if need > memory // 2:
        raise InputError(
            f"samples={samples} of {len(texts[-1]):,} lines take {need / 1e9:,.0f} GB of memory; give fewer --samples."
        )
    return texts


def command_significance(arguments: list[str]) -> int:
    """says which of two files of outputs is better, by the paired bootstrap"""
    about = "Says which of two files of outputs is better, by the paired bootstrap, as one JSON object."
    args = parse(SignificanceArguments, "transformer-jax significance", arguments, about)
    first, second, targets = _read(args.reference, args.outputs, args.samples)
    names = [None, *map(str, args.outputs)]
    found: dict[str, Any] = {"outputs": names[1:], "lines": len(targets), "samples": args.samples, "seed": args.seed}
    for name, measure in measures(args.tokenized_bleu).items():
        result = paired_bootstrap(first, second, targets, measure, args.samples, args.seed)
        found[name] = result | {"better": names[result["better"] or 0]}
    print(json.dumps(found, indent=2))
    return 0
