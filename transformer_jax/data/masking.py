"""Plain text -> texts of which some tokens are hidden, each to be told where it was (Devlin et al. 2019, 3.1)."""

import dataclasses

import numpy as np

from transformer_jax.config import DataConfig
from transformer_jax.data.examples import Fits, chunk, longest_that, of_example
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import Tokenizer

MASK = "<mask>"
NOTHING = -1  # in a target, where nothing is to be told
MASKED, SWAPPED = 0.8, 0.1  # of the tokens that are chosen; the rest stay as they are


def chosen_of(length: np.ndarray | int, rate: float) -> np.ndarray:
    """Tokens that are chosen of a text of some length: their number is not left to chance."""
    return np.clip(np.round(np.asarray(length) * rate), 1, length).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Masked:
    """Chunks of text as source, and as target the tokens that were chosen, NOTHING between them.

    Which are chosen and what becomes of them is drawn anew each epoch, from (seed, epoch, index) alone. Both share
    their places in a row, so a source takes no room of its own.

    Attributes:
        chunks: the texts.
        rate: the share of tokens that is chosen.
        mask: the id of <mask>.
        words: the ids that one may be swapped for.
        seed: of what is drawn.
    """

    chunks: Ragged
    rate: float
    mask: int
    words: np.ndarray
    seed: int

    @property
    def source_lengths(self) -> np.ndarray:
        return np.zeros(len(self.chunks), np.int64)

    @property
    def target_lengths(self) -> np.ndarray:
        return self.chunks.lengths

    def hide(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of one chunk."""
        ids, rng = self.chunks[index], of_example(self.seed, index, epoch)
        count = int(chosen_of(len(ids), self.rate))
        chosen = rng.choice(len(ids), count, replace=False)
        share = (np.arange(count) + rng.random()) / count  # even, so that the three kinds are as many as they should be
        source, target = ids.copy(), np.full_like(ids, NOTHING)
        target[chosen] = ids[chosen]
        source[chosen[share < MASKED]] = self.mask
        swapped = chosen[(share >= MASKED) & (share < MASKED + SWAPPED)]
        source[swapped] = rng.choice(self.words, len(swapped))
        return source, target

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        made = [self.hide(int(index), epoch) for index in indices]
        return Ragged.of([source for source, _ in made]), Ragged.of([target for _, target in made])


def masked_lm(documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> Masked:
    """The longest chunks that fit a row, with a share of `mask_rate` of their tokens chosen."""
    chunks = chunk(documents, longest_that(lambda length: fits(0, length)))
    return Masked(chunks, config.mask_rate, tokenizer.id_of(MASK), tokenizer.word_ids, seed)
