"""BPE-dropout (Provilkov et al. 2020): pairs in several segmentations, each with other merges left out by chance.

The library cannot be told a seed, so merging is done here: its own segmentation is taken apart, word by word, into the
symbols that it began with, and put together again. All that comes before the merges stays the library's affair.
"""

import heapq
import json
from collections.abc import Iterable, Sequence

import numpy as np

from transformer_jax.config import DataConfig
from transformer_jax.data.examples import SegmentedExamples, generator
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import InputError

Merges = dict[tuple[int, int], tuple[int, int]]  # two ids -> the rank of their merge, and the id that it makes
BLOCK = 2**18  # words whose chances are drawn at once
NEVER = 255  # pairs passed over: all that there are


def segmented(
    sources: Sequence[str], targets: Sequence[str], tokenizer: Tokenizer, config: DataConfig, seed: int
) -> SegmentedExamples:
    """Pairs in `config.bpe_segmentations` ways, with merges left out at a rate of `config.bpe_dropout`.

    Raises:
        InputError: the tokenizer has no merges.
    """
    count = config.bpe_segmentations

    def side(number: int, texts: Sequence[str], tokenizer: Tokenizer) -> Ragged:
        model = json.loads(tokenizer.inner.to_str())["model"]
        if not model.get("merges"):
            raise InputError(
                f"data.bpe_dropout={config.bpe_dropout} leaves out merges, and data.tokenizer={config.tokenizer!r} has "
                "none; --data.tokenizer bpe has."
            )
        keys = [(seed, number, turn) for turn in range(count)]
        return segment(tokenizer, texts, merges_of(model), config.bpe_dropout, keys)

    return SegmentedExamples(side(0, sources, tokenizer.source), side(1, targets, tokenizer), count)


def merges_of(model: dict) -> Merges:
    """The merges of a model as `tokenizer.json` has it."""
    vocabulary, cut = model["vocab"], len(model["continuing_subword_prefix"] or "")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    whole = [(rank, a, b, a + b[cut:]) for rank, (a, b) in enumerate(pairs) if a and b[cut:]]
    return {(vocabulary[a], vocabulary[b]): (rank, vocabulary[both]) for rank, a, b, both in whole}


def symbols_of(ids: Iterable[int], parts: dict[int, tuple[int, int]]) -> list[int]:
    """What ids were merged from, where `parts` says of which two each was made."""
    left, found = list(ids)[::-1], []
    while left:
        token = left.pop()
        if token in parts:
            left.extend(parts[token][::-1])
        else:
            found.append(token)
    return found


def merge(symbols: Sequence[int], merges: Merges, skips: Iterable[int]) -> list[int]:
    """Symbols put together: the pair of the lowest rank, of those the first, again and again until there is none.

    Before each merge as many pairs are passed over as `skips` says next; where none is behind them, it ends.
    """
    ids, end = [*symbols, -1], len(symbols)  # -1 where nothing is any more, and behind the end
    after, before = list(range(1, end + 2)), list(range(-1, end))
    line: list[tuple[int, int, int, int, int]] = []

    def enqueue(place: int) -> None:
        pair = ids[place], ids[after[place]]
        if pair in merges:
            rank, made = merges[pair]
            heapq.heappush(line, (rank, place, *pair, made))

    for place in range(end):
        enqueue(place)
    for skip in skips:
        passed = []
        while line and (len(passed) <= skip < NEVER):
            first = heapq.heappop(line)
            _, place, a, b, _ = first
            if ids[place] == a and ids[after[place]] == b:  # else one of them has been merged since
                passed.append(first)
        if len(passed) <= skip:
            break
        _, place, _, _, made = passed.pop()
        for each in passed:
            heapq.heappush(line, each)
        gone = after[place]
        ids[place], ids[gone], after[place] = made, -1, after[gone]
        before[after[gone]] = place
        enqueue(place)
        if before[place] >= 0:
            enqueue(before[place])
    return [token for token in ids if token >= 0]


def segment(
    tokenizer: Tokenizer, texts: Sequence[str], merges: Merges, share: float, keys: Sequence[tuple[int, ...]]
) -> Ragged:
    """All texts in as many segmentations as keys, one after the other: before a merge, each pair in turn is passed over
    with the chance `share`, anew each time. The numbers come from the keys alone."""
    table: dict[tuple[int, ...], int] = {}
    words = [[table.setdefault(word, len(table)) for word in text] for text in tokenizer.encode_in_words(texts)]
    uses = Ragged.of([np.array(text, np.int64) for text in words])
    parts = {made: pair for pair, (_, made) in merges.items()}
    symbols = [symbols_of(word, parts) for word in table]
    chances = np.array([len(each) - 1 for each in symbols], np.int64)  # merges that a word can have
    steps = np.array([len(each) - len(word) for each, word in zip(symbols, table, strict=True)], np.int64)
    found, known = [np.array(word, np.int32) for word in table], dict[tuple[int, bytes], int]()
    chosen = np.tile(uses.ids, len(keys)).astype(np.int64)
    for turn, key in enumerate(keys):
        rng = generator(*key)
        for start in range(0, len(uses.ids), BLOCK):
            block = uses.ids[start : start + BLOCK]
            offsets = np.append(0, np.cumsum(chances[block]))
            skips = np.minimum(rng.geometric(max(1 - share, 1e-12), offsets[-1]) - 1, NEVER).astype(np.uint8)
            passed = np.append(0, np.cumsum(skips > 0))
            others = np.flatnonzero(passed[offsets[:-1] + steps[block]] > passed[offsets[:-1]])
            for place in others.tolist():  # where something is passed over before all is merged
                word, own = int(block[place]), skips[offsets[place] : offsets[place + 1]].tobytes()
                if (word, own) not in known:
                    known[word, own] = len(found)
                    found.append(np.array(merge(symbols[word], merges, own), np.int32))
                chosen[turn * len(uses.ids) + start + place] = known[word, own]
    pieces = Ragged.of(found).take(chosen)
    lasts = (np.arange(len(keys))[:, None] * len(uses.ids) + uses.offsets[1:]).ravel()
    return Ragged(pieces.ids, np.append(0, pieces.offsets[lasts]))
