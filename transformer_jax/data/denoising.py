"""Objectives that hide spans of a text behind sentinels: T5's span corruption, and UL2's mixture of denoisers."""

import dataclasses
import math

import numpy as np

from transformer_jax.config import DataConfig
from transformer_jax.data.examples import Examples, Fits, chunk, generator, longest_that, of_example, selected
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import Tokenizer


def noise_shape(length: np.ndarray | int, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """(hidden tokens, spans) of a text of some length: deterministic, as in T5, so that lengths are known ahead."""
    length = np.asarray(length)
    hidden = np.clip(np.round(length * density), 1, length - 1).astype(np.int64)
    spans = np.clip(np.round(hidden / mean_span), 1, np.minimum(hidden, length - hidden)).astype(np.int64)
    return hidden, spans


def _pieces(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """`count` whole numbers of at least 1 that add up to `total`, each way of it equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to hide parts of a text.

    Attributes:
        density: the share of tokens that is hidden.
        mean_span: the mean length of a hidden span; infinity is one span at the end, which needs no sentinel.
        mode: the name of a token in front of the source that says which way it is, none where it is empty.
    """

    density: float
    mean_span: float
    mode: str = ""

    def spans(self, length: np.ndarray | int) -> np.ndarray:
        """Sentinels that the source of a text of some length has."""
        return noise_shape(length, self.density, self.mean_span)[1] * math.isfinite(self.mean_span)

    def shape(self, length: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the source and of the target."""
        hidden, spans = noise_shape(length, self.density, self.mean_span)[0], self.spans(length)
        return length - hidden + spans + bool(self.mode), hidden + spans + (spans > 0)

    def apply(self, ids: np.ndarray, rng: np.random.Generator, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, without the mode. Kept and hidden spans take turns, a kept one first; a last sentinel
        ends the target (Raffel et al. 2020, figure 2)."""
        hidden, spans = (int(n) for n in noise_shape(len(ids), self.density, self.mean_span))
        if not math.isfinite(self.mean_span):
            return ids[: len(ids) - hidden], ids[len(ids) - hidden :]
        kept, noise = _pieces(rng, len(ids) - hidden, spans), _pieces(rng, hidden, spans)
        is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, np.stack([kept, noise], 1).ravel())
        source = np.insert(ids[~is_noise], np.cumsum(kept), sentinels[:spans])
        target = np.insert(ids[is_noise], np.append(0, np.cumsum(noise)), sentinels[: spans + 1])
        return source, target


@dataclasses.dataclass(frozen=True)
class Denoised:
    """Chunks of text, each with its denoiser. Spans are drawn anew each epoch, from (seed, epoch, index) alone.

    Attributes:
        chunks: the texts.
        kinds: the number of each one's denoiser.
        denoisers: which there are.
        modes: the ids of their modes, -1 for none.
        sentinels: the ids of <extra_id_0>, <extra_id_1>, ...
        seed: of the spans.
    """

    chunks: Ragged
    kinds: np.ndarray
    denoisers: tuple[Denoiser, ...]
    modes: tuple[int, ...]
    sentinels: np.ndarray
    seed: int

    def _lengths(self, side: int) -> np.ndarray:
        shapes = np.stack([each.shape(self.chunks.lengths)[side] for each in self.denoisers])
        return shapes[self.kinds, np.arange(len(self.kinds))]

    @property
    def source_lengths(self) -> np.ndarray:
        return self._lengths(0)

    @property
    def target_lengths(self) -> np.ndarray:
        return self._lengths(1)

    def corrupt(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of one chunk."""
        kind, rng = self.kinds[index], of_example(self.seed, index, epoch)
        source, target = self.denoisers[kind].apply(self.chunks[index], rng, self.sentinels)
        return (source if self.modes[kind] < 0 else np.append(self.modes[kind], source).astype(np.int32)), target

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        made = [self.corrupt(int(index), epoch) for index in indices]
        return Ragged.of([source for source, _ in made]), Ragged.of([target for _, target in made])


def t5_denoisers(config: DataConfig) -> tuple[Denoiser, ...]:
    """T5's, as the config has it."""
    return (Denoiser(config.noise_density, config.mean_span),)


MODES = ("[R]", "[S]", "[X]")  # regular, sequential, extreme


def ul2_denoisers(config: DataConfig) -> tuple[Denoiser, ...]:
    """The seven of UL2 (Tay et al. 2022, table 1): two like T5's, one that goes on with a text, four that hide long
    spans or half of it. They are equally likely here."""
    regular, sequential, extreme = MODES
    return (
        Denoiser(0.15, 3, regular),
        Denoiser(0.15, 8, regular),
        Denoiser(0.25, math.inf, sequential),
        Denoiser(0.5, 3, extreme),
        Denoiser(0.5, 8, extreme),
        Denoiser(0.15, 64, extreme),
        Denoiser(0.5, 64, extreme),
    )


def longest_chunk(denoisers: tuple[Denoiser, ...], fits: Fits) -> int:
    """The longest text that fits a row whichever way it is hidden."""
    return longest_that(lambda length: all(fits(*map(int, each.shape(length))) for each in denoisers))


def sentinels_of(denoisers: tuple[Denoiser, ...], fits: Fits) -> int:
    """Sentinels that the vocabulary must have."""
    longest = longest_chunk(denoisers, fits)
    return max(int(each.spans(longest)) for each in denoisers) + 1


def denoised(
    documents: Ragged, fits: Fits, tokenizer: Tokenizer, denoisers: tuple[Denoiser, ...], seed: int
) -> Examples:
    """The longest chunks that fit a row; a document of one token has nothing to hide and stays out."""
    chunks = chunk(documents, longest_chunk(denoisers, fits))
    kinds = generator(seed, len(chunks)).integers(len(denoisers), size=len(chunks))
    modes = tuple(tokenizer.id_of(each.mode) if each.mode else -1 for each in denoisers)
    examples = Denoised(chunks, kinds, denoisers, modes, np.asarray(tokenizer.sentinel_ids, np.int32), seed)
    return selected(examples, np.flatnonzero(chunks.lengths > 1))


def span_corruption(documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> Examples:
    """T5's denoising: spans of a text give way to sentinels, and the target is the spans behind their sentinels."""
    return denoised(documents, fits, tokenizer, t5_denoisers(config), seed)


def ul2(documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> Examples:
    """UL2's mixture of denoisers, each text with its mode in front."""
    return denoised(documents, fits, tokenizer, ul2_denoisers(config), seed)
