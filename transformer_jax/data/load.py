"""A run's settings -> its tokenizer, its training batches and its validation rows."""

import dataclasses
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.config import ModelConfig, RunConfig, SpecialConfig
from transformer_jax.data import sources
from transformer_jax.data.batches import Batches, PackedRows, Rows, StreamRows
from transformer_jax.data.chat import DEFAULT, ChatExamples, Chats, Template, Turn
from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.dropout import segmented
from transformer_jax.data.examples import Examples, FixedExamples, selected
from transformer_jax.data.mixture import Joined, Mixture
from transformer_jax.data.objectives import (
    ARRANGEMENTS,
    TEXT_OBJECTIVES,
    arrangement_of,
    fitting,
    objective_name,
    room_of,
    tokens_needed,
    with_batch_size,
)
from transformer_jax.data.prepared import Prepared, check_tokenizer
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.sources import Corpus, Source, joined
from transformer_jax.data.tokenizer import TRAINERS, Tokenizer, make_tokenizer, papers_of
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole
from transformer_jax.tokens import ALL, Mine

MOST_TEMPLATE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything that a run reads.

    Attributes:
        config: the run's settings with what the data decided filled in (vocabulary size, objective).
        train: packed rows, or several sources of them.
        validation: packed rows.
        named: those of validation data that is scored by itself as well.
        held_out: the validation corpus as text.
        fingerprint: what identifies the training data, the validation data and the tokenizer, by which a resumed run
            knows them again: how much it is, and a digest.
        report: lines that say what was read.
    """

    config: RunConfig
    tokenizer: Tokenizer
    train: Rows | Mixture
    validation: Rows
    named: dict[str, Rows]
    held_out: Corpus
    fingerprint: dict[str, str]
    report: list[str]

    def batches(self, mine: Mine = ALL) -> Batches:
        """The training batches, or those places of them that a process reads."""
        return Batches(self.train, self.config.batch_size, self.config.seed, mine)


def _flag(name: str) -> str:
    """What messages call the data of a run by: its field of the settings; a flag as it is."""
    return name if name.startswith("--") else f"data.{name}"


def _fitting(name: str, corpus: Pairs | Chats | Prepared, need: np.ndarray, run: RunConfig) -> tuple[np.ndarray, str]:
    """The numbers of the pairs or conversations that fit a row, and what to say about the others."""
    room = room_of(run.model, run.data)
    too_long = np.flatnonzero((need > room).any(-1))
    if not len(too_long):
        return np.arange(len(corpus)), ""
    first = int(too_long[0])
    whats = "pairs" if corpus.kind == "pairs" else "chats"
    size, holds = (" + ".join(str(count) for count in each if count) for each in (need[first], room))
    limit, flags = f"max_length={run.model.max_length}", "--model.max-length"
    if run.data.source_length or run.data.target_length:
        limit, flags = f"a row has room for {holds}", f"--data.source-length, --data.target-length or {flags}"
    what = (
        f"{_flag(name)}: {len(too_long):,} of {len(corpus):,} {whats} are longer than a row; the first is "
        f"{corpus.place(first)} with {size} tokens, source and target, where {limit}"
    )
    if run.data.too_long == "error":
        of_run = not name.startswith("--")
        advice = f" Raise {flags}, or leave them out with --data.too-long drop." if of_run else ""
        raise InputError(f"{what}.{advice}")
    keep = np.setdiff1d(np.arange(len(corpus)), too_long)
    if not len(keep):
        raise InputError(f"{what}. Nothing is left.")
    return keep, f"{what}: left out"


def _chat_examples(
    name: str, corpus: Chats, run: RunConfig, tokenizer: Tokenizer
) -> tuple[Chats, Examples, str, list[str]]:
    """The conversations that fit a row, as text and as examples, how much they are, and what to say of the others.

    An encoder reads all before the last turn that is learned; without one all such turns are learned.
    """
    template, roles, report = template_of(run, tokenizer), run.data.learned_roles, []
    last = [max((n for n, turn in enumerate(turns) if turn.role in roles), default=-1) for turns in corpus.turns]
    learned = np.flatnonzero(np.asarray(last) >= 0)
    if len(learned) < len(corpus):
        report.append(
            f"{_flag(name)}: {len(corpus) - len(learned):,} chats have no turn of {', '.join(roles)}: left out"
        )
        corpus = Chats([corpus.turns[i] for i in learned], [corpus.places[i] for i in learned])
    arrangement, last = arrangement_of("chat", run.model.mode), [last[i] for i in learned]
    if arrangement.has_source:
        sources = Ragged.of([template.prompt(turns[:end]) for turns, end in zip(corpus.turns, last, strict=True)])
        said = [turns[end].content for turns, end in zip(corpus.turns, last, strict=True)]
        examples: Examples = FixedExamples(sources, Ragged.of(tokenizer.encode(said)))
    else:
        made = [template.encode(turns, roles) for turns in corpus.turns]
        examples = ChatExamples(Ragged.of([flags for _, flags in made]), Ragged.of([ids for ids, _ in made]))
    need = arrangement.lengths(examples.source_lengths, examples.target_lengths)
    keep, complaint = _fitting(name, corpus, need, run)
    sizes = int(examples.source_lengths.sum() + examples.target_lengths.sum())
    size = f"{len(keep):,} chats, {sizes:,} tokens"
    kept = Chats([corpus.turns[i] for i in keep], [corpus.places[i] for i in keep])
    return kept, selected(examples, keep), size, [*report, complaint] if complaint else report


def template_of(run: RunConfig, tokenizer: Tokenizer) -> Template:
    """What stands around the turns of a run's conversations."""
    return Template(run.data.chat_template or DEFAULT, tokenizer)


def _pair_examples(
    name: str, corpus: Pairs | Prepared, run: RunConfig, tokenizer: Tokenizer
) -> tuple[Pairs, Examples, str, list[str]]:
    """As `_chat_examples`, of pairs."""
    if name == "train" and run.data.bpe_dropout:
        if isinstance(corpus, Prepared):
            raise InputError(f"data.bpe_dropout: {corpus.folder} holds tokens already; give the text itself.")
        pairs: Examples = segmented(corpus.sources, corpus.targets, tokenizer, run.data, run.seed)
    else:
        pairs = FixedExamples(*corpus.tokens(tokenizer))
    lengths = pairs.source_lengths, pairs.target_lengths
    keep, complaint = _fitting(name, corpus, ARRANGEMENTS[run.model.mode].lengths(*lengths), run)
    size = f"{len(keep):,} pairs, {sum(map(np.sum, lengths)):,} tokens"
    if isinstance(corpus, Pairs):
        shown = corpus.chosen(keep)
    else:
        said = corpus.said(tokenizer, keep)
        shown = Pairs(said[0], said[1], [corpus.place(int(i)) for i in keep[: len(said[0])]])
    return shown, selected(pairs, keep), size, [complaint] if complaint else []


class Made(NamedTuple):
    """Packed rows of a corpus, the text of what they hold, and lines that say what was read."""

    rows: Rows
    text: Corpus
    report: list[str]


def make_rows(name: str, corpus: Source, run: RunConfig, tokenizer: Tokenizer) -> Made:
    """Packed rows of a corpus; `name` is its field of the data's settings, or the flag that it was given by.

    Raises:
        InputError: a pair is too long for a row, or there is nothing to learn from.
    """
    room = room_of(run.model, run.data)
    if isinstance(corpus, Chats):
        shown, examples, size, report = _chat_examples(name, corpus, run, tokenizer)
    elif isinstance(corpus, Pairs) or (isinstance(corpus, Prepared) and corpus.kind == "pairs"):
        shown, examples, size, report = _pair_examples(name, corpus, run, tokenizer)
    else:
        (documents,), count = corpus.tokens(tokenizer), len(corpus)
        shown = corpus if isinstance(corpus, Texts) else Texts(*corpus.said(tokenizer))
        size, report = f"{count:,} {'text' if count == 1 else 'texts'}, {documents.size:,} tokens", []
        if run.data.objective == "causal":
            ends = tokenizer.bos_id, tokenizer.eos_id
            rows = StreamRows(documents, *ends, room.target, run.seed, moving=name == "train")
            return Made(rows, shown, [f"{name}: {size} in {len(rows):,} rows of {room.target}, {rows.used:.0%} full"])
        objective = TEXT_OBJECTIVES[run.data.objective]
        least = objective.least
        if short := int(np.count_nonzero(documents.lengths < least)):
            report.append(f"{_flag(name)}: {short:,} of {count:,} texts have fewer tokens than {least}: left out")
        fits = fitting(run.data.objective, run.model, run.data)
        examples = objective.examples(documents, fits, tokenizer, run.data, run.seed)
    rows = _packed(examples, run, tokenizer)
    if not len(rows):
        raise InputError(f"{_flag(name)}: no example is long enough for the objective {run.data.objective}.")
    width = f"{room.source} + {room.target}" if room.source else str(room.target)
    line = f"{name}: {size} in {len(rows):,} rows of {width}, {rows.used:.0%} full"
    return Made(rows, shown, [*report, line + (_fuller(rows) if name == "train" else "")])


def _fuller(rows: PackedRows) -> str:
    """Advice where one side of the rows fills up long before the other."""
    source, target = rows.taken / (len(rows) * np.maximum(rows.room, 1))
    if not rows.room.source or min(source, target) > 0.8 * max(source, target):
        return ""
    name, room, share = (
        ("target", rows.room.target, target / source)
        if target < source
        else ("source", rows.room.source, source / target)
    )
    return f" (they would be fuller with --data.{name}-length {max(1, int(np.ceil(room * share)))})"


def _packed(examples: Examples, run: RunConfig, tokenizer: Tokenizer) -> PackedRows:
    bidirectional = run.model.prefix_attention == "bidirectional"
    arrangement = arrangement_of(run.data.objective, run.model.mode)
    return PackedRows(examples, arrangement, tokenizer, room_of(run.model, run.data), bidirectional)


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, special: SpecialConfig) -> None:
    """Raises InputError where a tokenizer has ids that the model has no row for."""
    if model.vocab_size < tokenizer.size:
        raise InputError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer.size} tokens."
        )
    if model.vocabulary_of("source") < tokenizer.source.size:
        raise InputError(
            f"model.source_vocab_size={model.vocabulary_of('source')} is smaller than the sources' tokenizer's "
            f"{tokenizer.source.size} tokens."
        )
    ids = [(role, getattr(tokenizer, f"{role}_id")) for role in ("pad", "bos", "eos", "sep")]
    ids += [("first", special.first or 0), *(("stops", number) for number in special.stops)]
    for role, number in ids:
        if number >= model.vocab_size:
            raise InputError(f"data.special.{role}={number} must be below model.vocab_size={model.vocab_size}.")


def resolve(run: RunConfig, corpora: list[Source], tokenizer: Tokenizer | None) -> tuple[RunConfig, Tokenizer]:
    """The run with all that its data decides filled in, and its tokenizer: the one given, or a new one.

    Raises:
        InputError: the objective is none for this data, or the vocabulary is smaller than the tokenizer.
    """
    first, data = corpora[0], run.data
    name = objective_name(first.kind, run.model, data)
    if data.chat_template and "{" not in data.chat_template:  # a path
        text = decode(data.chat_template, read_whole(data.chat_template, MOST_TEMPLATE))
        data = dataclasses.replace(data, chat_template=text)
    if isinstance(first, Prepared) and data.tokenizer in TRAINERS:
        data = dataclasses.replace(data, tokenizer=first.tokenizer_path)
    apart = bool(data.source_tokenizer)
    if apart and (first.kind != "pairs" or not ARRANGEMENTS[run.model.mode].has_source or isinstance(first, Prepared)):
        raise InputError("data.source_tokenizer is for pairs that are read as text, and an encoder to read them.")
    if tokenizer is None:
        names = tokens_needed(name, run.model, data)

        def made(kind: str, side: str, names: list[str]) -> Tokenizer:
            texts = (getattr(corpus, side) if apart else corpus.all_texts() for corpus in corpora)
            return make_tokenizer(
                kind, data.tokenizer_size, lambda: chain.from_iterable(texts), names, data.special.ids
            )

        tokenizer = made(data.tokenizer, "targets", names)
        if apart:
            tokenizer.source = made(data.source_tokenizer, "sources", [])
    changes: dict[str, Any] = {"vocab_size": run.model.vocab_size or tokenizer.size}
    if apart:
        size = run.model.source_vocab_size or tokenizer.source.size
        changes |= {"share_source_embedding": False, "source_vocab_size": size}
    model = run.model.replace(**changes)
    check_vocabulary(model, tokenizer, data.special)
    run = dataclasses.replace(run, model=model, data=dataclasses.replace(data, objective=name))
    return with_batch_size(run), tokenizer


def _fingerprint(corpus: Source) -> str:
    if isinstance(corpus, Prepared):
        return corpus.fingerprint
    digest, characters = blake2b(digest_size=16), 0
    for text in corpus.all_texts():
        digest.update(text.encode() + b"\0")
        characters += len(text)
    return f"{len(corpus):,} {corpus.kind}, {characters:,} characters, {digest.hexdigest()}"


def load_data(run: RunConfig, tokenizer: Tokenizer | None = None) -> Data:
    """Reads, tokenises and packs what a run's settings name; `tokenizer` is that of a run that goes on.

    Raises:
        InputError: the data is missing, broken, too long or too small; the message names the file and line.
    """
    found = sources.load_all(run.data)
    run, tokenizer = resolve(run, list(found.train.values()), tokenizer)
    for each in (*found.train.values(), *found.validation, *found.named.values()):
        if isinstance(each, Prepared):
            check_tokenizer(each, tokenizer, run.data.tokenizer)
    made = [make_rows("train", corpus, run, tokenizer) for corpus in found.train.values()]
    train = made[0].rows if len(made) == 1 else Mixture(tuple(each.rows for each in made), found.shares)
    if len(train) < run.batch_size:
        raise InputError(
            f"The training data makes {len(train)} rows, fewer than batch_size={run.batch_size}: too few examples for "
            "one batch. Lower --batch-size or --model.max-length, or give more data."
        )
    held_out = [make_rows("validation", corpus, run, tokenizer) for corpus in found.validation]
    validation = held_out[0].rows if len(held_out) == 1 else Joined(tuple(each.rows for each in held_out))
    named = {name: make_rows("validation_sets", corpus, run, tokenizer) for name, corpus in found.named.items()}
    if len(held_out) > 1:
        named |= dict(zip(found.train, held_out, strict=True))
    corpora = {"train": found.train.values(), "validation": (*found.validation, *found.named.values())}
    prints = {f"data.{name}": "; ".join(map(_fingerprint, each)) for name, each in corpora.items()}
    digest = blake2b("".join(papers_of(tokenizer).values()).encode(), digest_size=16).hexdigest()
    report = [f"{name}, {line}" if name else line for name, each in zip(found.train, made) for line in each.report]
    report += [line for each in held_out for line in each.report] if len(held_out) == 1 else []
    report += [f"{name}, {line}" for name, each in named.items() for line in each.report]
    return Data(
        config=run,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        named={name: each.rows for name, each in named.items()},
        held_out=joined([each.text for each in held_out]),
        fingerprint=prints | {"tokenizer": f"{tokenizer.size:,} tokens, {digest}"},
        report=report,
    )


def prompts_of(texts: list[str], config: RunConfig, tokenizer: Tokenizer) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """For each text (what the encoder reads, what the decoder has seen) when it is to be continued or answered.

    Raises:
        InputError: the objective has nothing to say after a prompt.
    """
    name, special = config.data.objective, config.data.special
    if not arrangement_of(name, config.model.mode).answers:
        raise InputError(
            f"A run with data.objective={name!r} continues and answers no prompts; `transformer-jax evaluate` says how "
            "good it is."
        )
    if name == "chat":
        template, prompt = template_of(config, tokenizer), arrangement_of(name, config.model.mode).prompt
        return [prompt(template.prompt([Turn("user", text)]).astype(np.int32), tokenizer) for text in texts]
    if special.prompts == "tokenizer" and name in ("causal", "sequence-to-sequence"):
        found, start = tokenizer.source.encode_as_published(texts), np.array([tokenizer.bos_id], np.int32)
        if ARRANGEMENTS[config.model.mode].has_source:
            return [(ids, start) for ids in found]
        if name == "causal":
            return [(None, ids if len(ids) else start) for ids in found]
    if name == "causal":
        return [(None, np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)) for ids in tokenizer.encode(texts)]
    prompt = arrangement_of(name, config.model.mode).prompt
    if name not in TEXT_OBJECTIVES:
        return [prompt(ids, tokenizer) for ids in tokenizer.source.encode(texts)]
    return [prompt(TEXT_OBJECTIVES[name].prompt(text, tokenizer).astype(np.int32), tokenizer) for text in texts]
