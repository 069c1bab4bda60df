"""What a model is asked to do with a text: each objective turns tokens into a source and a target.

    pairs   sequence-to-sequence   the pair as it is
    chat    chat                   a conversation, of which the turns of some roles are learned
    text    span-corruption        the text with spans hidden -> the spans (Raffel et al. 2020, 3.1.4)
    text    ul2                    seven ways to hide or go on, each with its mode in front (Tay et al. 2022)
    text    prefix-lm              a chunk up to a place that is drawn -> the rest (Raffel et al. 2020, 3.3.1)
    text    continuation           the first half of a chunk -> the second
    text    fill-in-the-middle     no source: chunks whose middle may come last (Bavarian et al. 2022)
    text    causal                 no source: each token from those before it
    text    masked-lm              no source: the tokens that were where masks are (Devlin et al. 2019, 3.1)

How source and target meet the model is the other half of the 2 x 2 table: an encoder-decoder keeps them apart, a
decoder-only model reads them joined in one sequence, with loss on the target. Both halves are rows in tables here.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.data.chat import MARKS
from transformer_jax.data.denoising import (
    MODES,
    Denoiser,
    sentinels_of,
    span_corruption,
    t5_denoisers,
    ul2,
    ul2_denoisers,
)
from transformer_jax.data.examples import (
    FIM,
    HOLE,
    Examples,
    Fits,
    continuation,
    fill_in_the_middle,
    fim_ids,
    prefix_lm,
)
from transformer_jax.data.masking import MASK, NOTHING, masked_lm
from transformer_jax.data.ragged import Ragged, chain, ranges
from transformer_jax.data.tokenizer import SENTINEL, Tokenizer, sentinels
from transformer_jax.errors import InputError


class Arranged(NamedTuple):
    """Examples as the model reads them.

    Attributes:
        source: what the encoder reads, None without one.
        read: what the decoder reads.
        predicted: the token to predict at each place of that.
        learned: 1 at the places where it is learned, else 0.
        given: the number of first tokens of what the decoder reads that were given, and can all see each other.
    """

    source: Ragged | None
    read: Ragged
    predicted: Ragged
    learned: Ragged
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
        needs: the prefix_attention that it makes sense with, None for any.
        answers: whether there is something to say after a prompt.
    """

    has_source: bool
    arrange: Callable[[Ragged, Ragged, Tokenizer], Arranged]
    extra: Room
    prompt: Callable[[np.ndarray, Tokenizer], tuple[np.ndarray | None, np.ndarray]]
    needs: Literal["causal", "bidirectional"] | None = None
    answers: bool = True

    def lengths(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64[n, 2], the room that examples take, from the lengths of their sources and targets."""
        if self.has_source:
            return np.stack([sources + self.extra.source, targets + self.extra.target], -1)
        return np.stack([np.zeros_like(sources), sources + targets + self.extra.target], -1)


def _one_on(source: Ragged | None, whole: Ragged, given: np.ndarray, flags: Ragged | None = None) -> Arranged:
    """All but the last token is read, all but the first is predicted: what is flagged of it is learned, or all that is
    not given."""
    lengths = whole.lengths - 1
    offsets, places = np.concatenate([[0], np.cumsum(lengths)]), ranges(whole.offsets[:-1], lengths)
    if flags is None:
        learned = ranges(np.ones_like(lengths), lengths) >= np.repeat(given, lengths)
    else:
        learned = flags.ids[places + 1]
    read, predicted = Ragged(whole.ids[places], offsets), Ragged(whole.ids[places + 1], offsets)
    return Arranged(source, read, predicted, Ragged(learned, offsets), given)


def _apart(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    whole = chain(tokenizer.bos_id, targets, tokenizer.eos_id)
    return _one_on(chain(sources, tokenizer.source.eos_id), whole, np.ones(len(targets), np.int64))


def _joined(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    whole = chain(tokenizer.bos_id, sources, tokenizer.sep_id, targets, tokenizer.eos_id)
    return _one_on(None, whole, sources.lengths + 2)


def _prompt_apart(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return np.append(source, tokenizer.source.eos_id), np.array([tokenizer.bos_id])


def _prompt_joined(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return None, np.concatenate([[tokenizer.bos_id], source, [tokenizer.sep_id]])


def _alone(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    whole = chain(tokenizer.bos_id, targets, tokenizer.eos_id)
    return _one_on(None, whole, np.ones(len(targets), np.int64))


def _prompt_alone(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return None, np.append(tokenizer.bos_id, source)


def _turns(flags: Ragged, tokens: Ragged, tokenizer: Tokenizer) -> Arranged:
    """What is given is what stands before the first token that is learned."""
    given = [int(np.argmax(flags[i])) if flags[i].any() else len(flags[i]) for i in range(len(flags))]
    return _one_on(None, tokens, np.asarray(given, np.int64), flags)


def _in_place(sources: Ragged, targets: Ragged, tokenizer: Tokenizer) -> Arranged:
    """All of a text is read and given; the target says what to predict at the same places."""
    read, said = chain(tokenizer.bos_id, sources, tokenizer.eos_id), chain(NOTHING, targets, NOTHING)
    learned = said.ids != NOTHING
    predicted = Ragged(np.where(learned, said.ids, 0), said.offsets)
    return Arranged(None, read, predicted, Ragged(learned, said.offsets), read.lengths)


def _prompt_told(source: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray | None, np.ndarray]:
    return None, source


# Conversations in one sequence, whose template has said all that is in it; the last token is only predicted.
TURNS = Arrangement(False, _turns, Room(0, -1), _prompt_told)
# Examples without a source, where there is no encoder either.
ALONE = Arrangement(False, _alone, Room(0, 1), _prompt_alone, "causal")
# Texts whose source and target share their places, so that the decoder is an encoder.
IN_PLACE = Arrangement(False, _in_place, Room(0, 2), _prompt_alone, "bidirectional", answers=False)
# The 2 x 2 table's two columns. The target's last token is only predicted, so it takes no room.
ARRANGEMENTS = {
    "encoder-decoder": Arrangement(True, _apart, Room(1, 1), _prompt_apart),
    "decoder-only": Arrangement(False, _joined, Room(0, 2), _prompt_joined),
}


# --- what each objective is


def _plain(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.encode([text])[0]


def _with_sentinels(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.encode_with_sentinels(text)


def _with_mode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A text with sentinels is to be filled in, one without is to be gone on with."""
    mode = MODES[0] if SENTINEL.search(text) else MODES[1]
    return np.append(tokenizer.id_of(mode), tokenizer.encode_with_sentinels(text)).astype(np.int32)


def _with_hole(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """What is around a hole, behind its marks; a text without one is gone on with."""
    before, hole, behind = text.partition(HOLE)
    if not hole:
        return _plain(text, tokenizer)
    prefix, suffix, middle = fim_ids(tokenizer)
    a, c = tokenizer.encode([before, behind])
    return np.concatenate([[prefix], a, [suffix], c, [middle]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What becomes of plain text.

    Attributes:
        examples: (documents, whether lengths fit a row, tokenizer, config, seed) -> Examples.
        least: tokens that a document must have.
        denoisers: those whose sentinels the vocabulary must have.
        names: other tokens that it must have.
        prompt: (text, tokenizer) -> the ids of what is to be answered.
        arrangement: that of an objective without a source, which no encoder goes with; None for that of the mode.
    """

    examples: Callable[[Ragged, Fits, Tokenizer, DataConfig, int], Examples]
    least: int = 1
    denoisers: Callable[[DataConfig], tuple[Denoiser, ...]] | None = None
    names: tuple[str, ...] = ()
    prompt: Callable[[str, Tokenizer], np.ndarray] = _plain
    arrangement: Arrangement | None = None


TEXT_OBJECTIVES = {
    "span-corruption": Objective(span_corruption, 2, t5_denoisers, prompt=_with_sentinels),
    "ul2": Objective(ul2, 2, ul2_denoisers, MODES, _with_mode),
    "prefix-lm": Objective(prefix_lm),
    "continuation": Objective(continuation),
    "fill-in-the-middle": Objective(fill_in_the_middle, names=FIM, prompt=_with_hole, arrangement=ALONE),
    "masked-lm": Objective(masked_lm, names=(MASK,), arrangement=IN_PLACE),
}


def arrangement_of(name: str, mode: str) -> Arrangement:
    """How the examples of an objective meet a model of a mode."""
    if name == "chat" and not ARRANGEMENTS[mode].has_source:
        return TURNS
    own = ALONE if name == "causal" else name in TEXT_OBJECTIVES and TEXT_OBJECTIVES[name].arrangement
    return own or ARRANGEMENTS[mode]


def room_of(model: ModelConfig, data: DataConfig) -> Room:
    """Tokens of source and target in one row; without a source of its own, a row's target has the room of both."""
    source, target = data.source_length or model.max_length, data.target_length or model.max_length
    if ARRANGEMENTS[model.mode].has_source:
        return Room(source, target)
    return Room(0, min(source + target, model.max_length))


def with_batch_size(run: RunConfig) -> RunConfig:
    """The run with as many rows in a batch as `batch_tokens` says.

    Raises:
        InputError: they are fewer than its microbatches.
    """
    if not run.batch_tokens:
        return run
    width, least = room_of(run.model, run.data).target, run.optimizer.accumulate
    rows = run.batch_tokens // width // least * least
    if not rows:
        raise InputError(
            f"batch_tokens={run.batch_tokens} is less than {least} {'rows' if least > 1 else 'row'} of {width} tokens."
        )
    return dataclasses.replace(run, batch_size=rows)


def fitting(name: str, model: ModelConfig, data: DataConfig) -> Fits:
    """Whether a source and a target of some lengths fit a row."""
    room, arrangement = room_of(model, data), arrangement_of(name, model.mode)

    def fits(source: int, target: int) -> bool:
        need = arrangement.lengths(np.asarray(source), np.asarray(target))
        return bool((need <= room).all())

    return fits


def tokens_needed(name: str, model: ModelConfig, data: DataConfig) -> list[str]:
    """Names of tokens, sentinels among them, that the vocabulary must have for an objective."""
    if name == "chat":
        return [] if data.chat_template else list(MARKS)
    objective = TEXT_OBJECTIVES.get(name)
    if objective is None:
        return []
    count = sentinels_of(objective.denoisers(data), fitting(name, model, data)) if objective.denoisers else 0
    return [*sentinels(count), *objective.names]


def objective_name(kind: str, model: ModelConfig, data: DataConfig) -> str:
    """The objective of a run: as given, or the natural one for the kind of data and the mode.

    Raises:
        InputError: the objective makes no sense for this kind of data or this mode.
    """
    has_source = ARRANGEMENTS[model.mode].has_source
    natural = {("pairs", True): "sequence-to-sequence", ("pairs", False): "sequence-to-sequence"}
    of_text = "causal" if model.prefix_attention == "causal" else "prefix-lm"
    natural |= {("text", True): "span-corruption", ("text", False): of_text}
    natural |= {("chat", True): "chat", ("chat", False): "chat"}
    name = natural[kind, has_source] if data.objective == "auto" else data.objective
    if {"sequence-to-sequence": "pairs", "chat": "chat"}.get(name, "text") != kind:
        raise InputError(f"data.objective={name!r} does not go with data that is {kind}; leave it at 'auto'.")
    if data.bpe_dropout and kind != "pairs":
        raise InputError(
            f"data.bpe_dropout={data.bpe_dropout} is for pairs; data.objective={name!r} cuts texts by their tokens."
        )
    needs = arrangement_of(name, model.mode).needs
    if needs and has_source:
        raise InputError(
            f"data.objective={name!r} has no source for an encoder; take span-corruption, ul2 or prefix-lm, or "
            "--model.mode decoder-only."
        )
    if needs == "causal" != model.prefix_attention:
        raise InputError(
            f"model.prefix_attention='bidirectional' needs a prefix, and data.objective={name!r} has none."
        )
    if needs == "bidirectional" != model.prefix_attention:
        raise InputError(
            f"data.objective={name!r} needs --model.prefix-attention bidirectional: each token sees all of its text."
        )
    return name
