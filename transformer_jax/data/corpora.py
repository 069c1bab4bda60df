"""What files hold, in memory: texts, or pairs of them. Those that were prepared lie on the disk: `prepared.py`."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Texts:
    """Plain text, a document each."""

    documents: list[str]
    kind = "text"

    def __len__(self) -> int:
        return len(self.documents)

    def all_texts(self) -> Iterator[str]:
        """Every text there is, for training a tokenizer."""
        return iter(self.documents)

    def tokens(self, tokenizer: Tokenizer) -> tuple[Ragged, ...]:
        """Of each text."""
        return (Ragged.of(tokenizer.encode(self.documents)),)

    def split(self, fraction: float) -> tuple["Texts", "Texts"]:
        """The last `fraction` of the characters held out, at a document's end; a lone document is cut in two."""
        if len(self.documents) == 1:
            cut = int(len(self.documents[0]) * (1 - fraction))
            return Texts([self.documents[0][:cut]]), Texts([self.documents[0][cut:]])
        left, first = fraction * sum(map(len, self.documents)), len(self.documents)
        while first > 1 and left > 0:
            first -= 1
            left -= len(self.documents[first])
        return Texts(self.documents[:first]), Texts(self.documents[first:])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sources and their targets; `places` says where each came from, for messages."""

    sources: list[str]
    targets: list[str]
    places: list[str]
    kind = "pairs"

    def __len__(self) -> int:
        return len(self.sources)

    def all_texts(self) -> Iterator[str]:
        """Every text there is, for training a tokenizer."""
        yield from self.sources
        yield from self.targets

    def tokens(self, tokenizer: Tokenizer) -> tuple[Ragged, ...]:
        """Of the sources and of the targets."""
        return Ragged.of(tokenizer.source.encode(self.sources)), Ragged.of(tokenizer.encode(self.targets))

    def chosen(self, kept: np.ndarray) -> "Pairs":
        """Some of the pairs."""
        return Pairs(*([values[i] for i in kept] for values in (self.sources, self.targets, self.places)))

    def place(self, index: int) -> str:
        """Where a pair came from, for messages."""
        return self.places[index]

    def take(self, chosen: slice) -> "Pairs":
        """A stretch of the pairs."""
        return Pairs(self.sources[chosen], self.targets[chosen], self.places[chosen])

    def split(self, fraction: float) -> tuple["Pairs", "Pairs"]:
        """The last `fraction` of the pairs held out."""
        cut = min(int(len(self) * (1 - fraction)), len(self) - 1)
        return self.take(slice(cut)), self.take(slice(cut, None))
