"""How good outputs are beside their targets. Each number has a name of its own, and a signature that says what it is.

`bleu` and `chrf` are sacreBLEU's, of text as people read it. Papers on small data often give another BLEU, of
lower-cased text in Moses's tokens, which is higher; here it is `tokenized_bleu_lowercased`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

TOKENIZED_BLEU = "tokenized_bleu_lowercased"
AS_THEY_ARE = "none"  # in place of a language: texts are tokens already


class Measure(NamedTuple):
    """A score of sacreBLEU's, of 100, more is better.

    Attributes:
        metric: sacreBLEU's.
        prepare: makes of a text what is compared.
        sign: makes of the metric's own signature that which is told.
    """

    metric: Any
    prepare: Callable[[str], str] = str
    sign: Callable[[str], str] = str

    @property
    def signature(self) -> str:
        """What was measured, once something was."""
        return self.sign(str(self.metric.get_signature()))


def _tokenized(language: str) -> Measure:
    from sacrebleu.metrics.bleu import BLEU

    from transformer_jax.translation.moses import tokenizing, version

    metric, end = BLEU(lowercase=True, tokenize="none", force=True), "|not comparable with bleu"
    if language == AS_THEY_ARE:
        return Measure(metric, sign=lambda text: text + end)
    tokens = f"tok:moses-{language}-sacremoses-{version(language)}"
    return Measure(metric, tokenizing(language, lowercase=True), lambda text: text.replace("tok:none", tokens) + end)


def measures(tokenized: str = "") -> dict[str, Measure]:
    """sacreBLEU (Post 2018) and chrF (Popovic 2015); with the language of `tokenized` also BLEU of Moses's tokens of
    lower-cased text, or with "none" of lower-cased text as it is.

    Raises:
        InputError: there is no such language, or `sacremoses` is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    found = {"bleu": Measure(BLEU(force=tokenized == AS_THEY_ARE)), "chrf": Measure(CHRF())}
    return found | {TOKENIZED_BLEU: _tokenized(tokenized)} if tokenized else found


def exact_match(outputs: list[str], targets: list[str]) -> float:
    """Share of outputs that equal their target, space at the ends aside."""
    return sum(o.strip() == t.strip() for o, t in zip(outputs, targets, strict=True)) / max(len(targets), 1)


def translation_scores(outputs: list[str], targets: list[str], tokenized: str = "") -> dict[str, Any]:
    """Exact match, and all `measures` with their signatures.

    Raises:
        InputError: as `measures`.
    """
    scores: dict[str, Any] = {"exact_match": exact_match(outputs, targets)}
    for name, measure in measures(tokenized).items():
        texts, wanted = (list(map(measure.prepare, each)) for each in (outputs, targets))
        scores[name] = measure.metric.corpus_score(texts, [wanted]).score
        scores[f"{name}_signature"] = measure.signature
    return scores
