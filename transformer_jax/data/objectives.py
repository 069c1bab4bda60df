"""What a model is asked to do with a text: each objective turns tokens into a source and a target.

    pairs   sequence-to-sequence   the pair as it is
    text    span-corruption        the text with spans hidden -> the spans (Raffel et al. 2020, 3.1.4)
    text    continuation           the first half of a chunk -> the second
    text    causal                 no source: each token from those before it

How source and target meet the model is the other half of the 2 x 2 table: an encoder-decoder keeps them apart, a
decoder-only model reads them joined in one sequence, with loss on the target. Both halves are rows in tables here.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from transformer_jax.config import DataConfig, ModelConfig
from transformer_jax.data.ragged import Ragged, chain, ranges
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import InputError


class Arranged(NamedTuple):
    """Examples as the model reads them.

    Attributes:
        source: what the encoder reads, None without one.
        target: what the decoder reads and, one token on, predicts.
        given: the number of a target's first tokens that are given and not learned.
    """

    source: Ragged | None
    target: Ragged
    given: np.ndarray


class Room(NamedTuple):
    """Tokens of source and of target in a row; no source is 0."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How source and target meet the model.

    Attributes:
        has_source: whether the source has a place of its own.
        arrange: (sources, targets, tokenizer) -> Arranged.
        extra: tokens that are added to a source and to a target, as the room they take in a row.
        prompt: (source ids, tokenizer) -> (what the encoder reads or None, what the decoder has seen).
    """

    has_source: bool
    arrange: Callable[[Ragged, Ragged, Tokenizer], Arranged]
    extra: Room
    prompt: Callable[[np.ndarray, Tokenizer], tuple[np.ndarray | None, np.ndarray]]

    def lengths(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64[n, 2], the room that examples take, from the lengths of their sources and targets."""
        if self.has_source:
            return np.stack([sources + self.extra.source, targets + self.extra.target], -1)
        return np.stack([np.zeros_like(sources), sources + targets + self.extra.target], -1)


def _apart(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    target = chain(tokenizer.bos_id, targets, tokenizer.eos_id)
    return Arranged(chain(sources, tokenizer.eos_id), target, np.ones(len(targets), np.int64))


def _joined(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    target = chain(tokenizer.bos_id, sources, tokenizer.sep_id, targets, tokenizer.eos_id)
    return Arranged(None, target, sources.lengths + 2)


def _prompt_apart(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return np.append(source, tokenizer.eos_id), np.array([tokenizer.bos_id])


def _prompt_joined(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return None, np.concatenate([[tokenizer.bos_id], source, [tokenizer.sep_id]])


# The 2 x 2 table's two columns. The target's last token is only predicted, so it takes no room.
ARRANGEMENTS = {
    "encoder-decoder": Arrangement(True, _apart, Room(1, 1), _prompt_apart),
    "decoder-only": Arrangement(False, _joined, Room(0, 2), _prompt_joined),
}


class Examples(Protocol):
    """Sources and targets by index; their lengths are known before they are made, so rows can be packed ahead."""

    @property
    def source_lengths(self) -> np.ndarray: ...
    @property
    def target_lengths(self) -> np.ndarray: ...
    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]: ...


@dataclasses.dataclass(frozen=True)
class FixedExamples:
    """The same source and target every epoch."""

    sources: Ragged
    targets: Ragged

    @property
    def source_lengths(self) -> np.ndarray:
        return self.sources.lengths

    @property
    def target_lengths(self) -> np.ndarray:
        return self.targets.lengths

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        return self.sources.take(indices), self.targets.take(indices)


def chunk(documents: Ragged, longest: int) -> Ragged:
    """Each document cut into as few pieces of at most `longest` tokens as there can be, nearly equal in length."""
    pieces = -(-documents.lengths // longest)
    which = np.repeat(np.arange(len(documents)), pieces)
    part = ranges(np.zeros(len(documents), np.int64), pieces)
    starts = documents.lengths[which] * part // pieces[which]
    inner = documents.offsets[which] + starts
    return Ragged(documents.ids, np.append(inner, documents.offsets[-1]))


def continuation(documents: Ragged, fits: Callable[[int, int], bool], tokenizer, config, seed) -> FixedExamples:
    """The first half of each chunk of text is the source, the second half the target."""
    longest = _longest(lambda length: (length // 2, length - length // 2), fits)
    chunks = chunk(documents, longest)
    halves = chunks.lengths // 2
    starts = chunks.offsets[:-1]
    sources = Ragged(chunks.ids[ranges(starts, halves)], np.append(0, np.cumsum(halves)))
    rest = chunks.lengths - halves
    return FixedExamples(sources, Ragged(chunks.ids[ranges(starts + halves, rest)], np.append(0, np.cumsum(rest))))


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
class SpanCorruption:
    """T5's denoising: spans of a text give way to sentinels, and the target is the spans behind their sentinels.

    Spans are drawn anew each epoch, from (seed, epoch, index) alone.
    """

    chunks: Ragged
    sentinels: np.ndarray
    density: float
    mean_span: float
    seed: int

    @property
    def source_lengths(self) -> np.ndarray:
        hidden, spans = noise_shape(self.chunks.lengths, self.density, self.mean_span)
        return self.chunks.lengths - hidden + spans

    @property
    def target_lengths(self) -> np.ndarray:
        hidden, spans = noise_shape(self.chunks.lengths, self.density, self.mean_span)
        return hidden + spans + 1

    def corrupt(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of one chunk. Kept and hidden spans take turns, a kept one first; a last sentinel ends
        the target (Raffel et al. 2020, figure 2)."""
        ids = self.chunks[index]
        hidden, spans = (int(n) for n in noise_shape(len(ids), self.density, self.mean_span))
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 40) + index]))
        kept, noise = _pieces(rng, len(ids) - hidden, spans), _pieces(rng, hidden, spans)
        is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, np.stack([kept, noise], 1).ravel())
        kept_ends, noise_ends = np.cumsum(kept), np.cumsum(noise)
        source = np.insert(ids[~is_noise], kept_ends, self.sentinels[:spans])
        target = np.insert(ids[is_noise], np.append(0, noise_ends), self.sentinels[: spans + 1])
        return source, target

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        made = [self.corrupt(int(index), epoch) for index in indices]
        return Ragged.of([source for source, _ in made]), Ragged.of([target for _, target in made])


def _longest(shape: Callable[[int], tuple[int, int]], fits: Callable[[int, int], bool]) -> int:
    """The longest chunk whose source and target fit a row."""
    low, high = 2, 4
    while fits(*shape(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(*shape(middle)) else (low, middle)
    if not fits(*shape(low)):
        raise InputError("max_length is too small for this objective: not even two tokens of text fit a row.")
    return low


def _corrupted_shape(config: DataConfig) -> Callable[[int], tuple[int, int]]:
    def shape(length: int) -> tuple[int, int]:
        hidden, spans = (int(n) for n in noise_shape(length, config.noise_density, config.mean_span))
        return length - hidden + spans, hidden + spans + 1

    return shape


def span_corruption(documents: Ragged, fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> SpanCorruption:
    """The longest chunks whose corrupted form fits a row; a document of one token has nothing to hide and stays out."""
    longest = _longest(_corrupted_shape(config), fits)
    chunks = chunk(documents.take(np.flatnonzero(documents.lengths > 1)), longest)
    sentinels = np.asarray(tokenizer.sentinel_ids, np.int32)
    return SpanCorruption(chunks, sentinels, config.noise_density, config.mean_span, seed)


TEXT_OBJECTIVES = {"span-corruption": span_corruption, "continuation": continuation}


def room_of(model: ModelConfig, data: DataConfig) -> Room:
    """Tokens of source and target in one row; without a source of its own, a row's target has the room of both."""
    source, target = data.source_length or model.max_length, data.target_length or model.max_length
    if ARRANGEMENTS[model.mode].has_source:
        return Room(source, target)
    return Room(0, min(source + target, model.max_length))


def fitting(model: ModelConfig, data: DataConfig) -> Callable[[int, int], bool]:
    """Whether a source and a target of some lengths fit a row."""
    room, arrangement = room_of(model, data), ARRANGEMENTS[model.mode]

    def fits(source: int, target: int) -> bool:
        need = arrangement.lengths(np.asarray(source), np.asarray(target))
        return bool((need <= room).all())

    return fits


def sentinels_needed(name: str, model: ModelConfig, data: DataConfig) -> int:
    """Sentinel tokens that the vocabulary must have for an objective."""
    if name != "span-corruption":
        return 0
    longest = _longest(_corrupted_shape(data), fitting(model, data))
    return int(noise_shape(longest, data.noise_density, data.mean_span)[1]) + 1


def objective_name(kind: str, model: ModelConfig, data: DataConfig) -> str:
    """The objective of a run: as given, or the natural one for the kind of data and the mode.

    Raises:
        InputError: the objective makes no sense for this kind of data or this mode.
    """
    has_source = ARRANGEMENTS[model.mode].has_source
    natural = {("pairs", True): "sequence-to-sequence", ("pairs", False): "sequence-to-sequence"}
    natural |= {("text", True): "span-corruption", ("text", False): "causal"}
    name = natural[kind, has_source] if data.objective == "auto" else data.objective
    if (name == "sequence-to-sequence") != (kind == "pairs"):
        raise InputError(f"data.objective={name!r} does not go with data that is {kind}; leave it at 'auto'.")
    if name == "causal" and model.prefix_attention == "bidirectional":
        raise InputError("model.prefix_attention='bidirectional' needs a prefix, and data.objective='causal' has none.")
    if name == "causal" and has_source:
        raise InputError(
            "data.objective='causal' has no source for an encoder; take span-corruption or continuation, or "
            "--model.mode decoder-only."
        )
    return name
