"""`transformer-jax generate`: prompts from a flag, a file or stdin -> outputs, in the order of the prompts."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_jax.config import ParallelConfig
from transformer_jax.errors import InputError
from transformer_jax.files import check_output, decode, read_stream, read_whole, write_output
from transformer_jax.flags import RunFolder, papers, parse

if TYPE_CHECKING:
    from transformer_jax.decoding import Prompt
    from transformer_jax.evaluate import Answer
    from transformer_jax.run import Run

BATCHES = 64  # that are sorted by length together; their outputs come out when all of them are done


@dataclasses.dataclass(frozen=True)
class GenerateArguments:
    run: RunFolder
    """A run's folder."""
    checkpoint: str = "newest"
    """The checkpoint to read: newest, best (as --checkpoint.best of the run says), or a step."""
    prompt: str | None = None
    """One prompt; on a terminal its output appears as it comes. None given: one a line from `input`."""
    input: Path | None = None
    """A file of prompts, one a line. None given: stdin."""
    output: Path | None = None
    """Where the outputs go, one a line. None given: stdout."""
    json: bool = False
    """One JSON object for each prompt: line, prompt, and its outputs with text, ids, tokens and score."""
    n_best: bool = False
    """Each output as `line ||| text ||| score`, with lines of prompts from 0, as Moses and Marian number them."""
    beam_size: int = 1
    """Width of the beam search; 1 is none."""
    num_return: int = 1
    """Outputs for each prompt, one after the other, the best first: of a beam search, or drawn."""
    length_penalty: float = 1.0
    """Exponent on the length that a beam's score is divided by."""
    early_stopping: bool = False
    """End a beam search once beam-size outputs have ended, as fairseq does, not where no other can become better."""
    temperature: float | None = None
    """Draw tokens with this temperature. With none of temperature, top-k, top-p and min-p the likeliest are taken."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probability reaches this."""
    min_p: float | None = None
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that prompt or output have already become less likely (Keskar et al. 2019)."""
    prefix: str = ""
    """What every output has to begin with."""
    max_new_tokens: int | None = None
    """Most new tokens. None: what the run's config says, as far as the model's length allows."""
    seed: int = 0
    """Of the drawing."""
    batch_size: int = 32
    """Prompts decoded together."""
    int8_cache: bool = False
    """Keep keys and values in 8 bits."""
    int8_weights: bool = False
    """Round weights to 8 bits, with a scale for each output: a quarter of float32's memory."""
    draft: str | None = None
    """The folder of a smaller run with the same tokenizer, which proposes tokens that this one checks several at once
    (Leviathan et al. 2023). The outputs are those of this run."""
    draft_tokens: int = 4
    """Tokens that the draft proposes at once."""
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        for name in ("beam_size", "num_return", "batch_size", "max_new_tokens", "draft_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least 1.")
        if self.temperature is not None and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 1e-06 and finite.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length-penalty={self.length_penalty} must be finite.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition-penalty={self.repetition_penalty} must be above 0 and finite.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k={self.top_k} must be at least 1.")
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)} must lie in (0, 1].")
        drawing = [f"{name.replace('_', '-')}={value}" for name, value in self.drawing.items()]
        if self.beam_size > 1 and drawing:
            raise ValueError(f"beam-size={self.beam_size} takes the likeliest outputs, {drawing[0]} draws: give one.")
        if self.beam_size > 1 and self.repetition_penalty != 1:
            raise ValueError(f"repetition-penalty={self.repetition_penalty} is not for a beam-size above 1.")
        if self.early_stopping and self.beam_size == 1:
            raise ValueError("--early-stopping is for a beam search: give a --beam-size above 1.")
        if self.num_return > 1 and not drawing and self.num_return > self.beam_size:
            raise ValueError(
                f"num-return={self.num_return} needs a beam-size of as many, or drawing with a temperature; got "
                f"beam-size={self.beam_size}."
            )
        if self.draft is not None and (self.beam_size > 1 or self.repetition_penalty != 1 or self.prefix):
            raise ValueError(f"draft={self.draft} is not for a beam-size, a repetition-penalty or a prefix.")
        if self.json and self.n_best:
            raise ValueError("Give --json or --n-best, not both.")
        if self.prompt is not None and self.input is not None:
            raise ValueError("Give --prompt or --input, not both.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32.")
        if self.parallel.strategy == "pmap" or self.parallel.coordinator:
            raise ValueError("generate takes --parallel.strategy jit or mesh, in one process.")

    @property
    def drawing(self) -> dict[str, Any]:
        """The options of drawing that are given."""
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The options of `generate_all`."""
        import jax

        names = ("beam_size", "num_return", "length_penalty", "early_stopping", "repetition_penalty", "int8_cache")
        options = {name: getattr(self, name) for name in names} | self.drawing
        return options | ({"key": jax.random.key(self.seed)} if self.drawing else {})


def _texts(args: GenerateArguments) -> list[str]:
    if args.prompt is not None:
        return [decode("--prompt", args.prompt.encode(errors="surrogateescape"))]
    name = str(args.input or "stdin")
    raw = read_whole(args.input) if args.input is not None else read_stream(name, sys.stdin.buffer)
    text = decode(name, raw)
    if not text:
        raise InputError(f"{name}: there is no prompt. Give one a line, or --prompt.")
    return text.removesuffix("\n").split("\n")


def _check(args: GenerateArguments, prompts: "list[Prompt]", new: int, most: int) -> None:
    """Raises InputError for the first prompt that is too long for the model."""
    for number, (source, seen) in enumerate(prompts, 1):
        if len(seen) + new > most or (source is not None and len(source) > most):
            where = "--prompt" if args.prompt is not None else f"{args.input or 'stdin'}, line {number}"
            size = len(seen) if source is None else len(source)
            raise InputError(
                f"{where}: {size} tokens, and {new} new ones, are longer than the model's max_length={most}."
            )


def _object(number: int, prompt: str, answers: "list[Answer]", run: "Run") -> str:
    outputs = [
        {
            "text": answer.text,
            "ids": answer.ids.tolist(),
            "tokens": run.tokenizer.tokens(answer.ids),
            "score": answer.score,
        }
        for answer in answers
    ]
    return json.dumps({"line": number, "prompt": prompt, "outputs": outputs}, ensure_ascii=False) + "\n"


def _printed(number: int, prompt: str, answers: "list[Answer]", run: "Run", args: GenerateArguments, lone: bool) -> str:
    """The outputs of a prompt as they are printed; each in one line, but a lone one as it is."""
    if args.json:
        return _object(number, prompt, answers, run)
    if lone and not args.n_best:
        return answers[0].text + "\n"
    form = f"{number - 1} ||| {{}} ||| {{:.6f}}\n" if args.n_best else "{}\n"
    return "".join(form.format(answer.text.replace("\n", "\\n"), answer.score) for answer in answers)


def _streamed(run: "Run", prompt: "Prompt", options: dict[str, Any]) -> Iterator[str]:
    """An output's text in the parts that tokens add to it."""
    from transformer_jax.decoding import stream_one

    ids, shown = [], ""
    for token in stream_one(run.model, run.params, prompt, **options):
        ids.append(token)
        text = run.tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):  # else a letter's bytes are still coming
            yield text[len(shown) :]
            shown = text
    yield run.tokenizer.decode(ids)[len(shown) :] + "\n"


def command_generate(arguments: list[str]) -> int:
    """answers or continues prompts, one a line"""
    about = "Answers or continues prompts, one a line."
    args = parse(GenerateArguments, "transformer-jax generate", arguments, about, switches=True)
    from transformer_jax.host import prepare
    from transformer_jax.partition import Partitioner
    from transformer_jax.run import in_int8, load_run

    prepare()
    partitioner = Partitioner.create(args.parallel)
    run = load_run(args.run, args.checkpoint, partitioner)
    if args.int8_weights:
        run = in_int8(run, partitioner)
    most = run.config.model.max_length
    wanted = args.max_new_tokens or 1
    if wanted >= most:
        raise InputError(f"--max-new-tokens {wanted} must be below the model's max_length={most}.")
    texts = _texts(args)
    check_output(args.output, "--output", *([args.input] if args.input else []), *papers(args.run))
    import numpy as np

    from transformer_jax.data.load import prompts_of
    from transformer_jax.evaluate import answers, decoding_options

    prompts = prompts_of(texts, run.config, run.tokenizer)
    options = decoding_options(run.config, run.tokenizer) | args.options
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.prefix:
        prefix = np.asarray(run.tokenizer.encode([args.prefix])[0], np.int32)
        options["forced"] = np.concatenate([options.get("forced", prefix[:0]), prefix])
        wanted = max(wanted, len(options["forced"]) + 1)
    _check(args, prompts, wanted, most)
    if args.draft is not None:
        draft = load_run(args.draft, partitioner=partitioner)
        if draft.tokenizer.to_json() != run.tokenizer.to_json() or draft.config.model.mode != run.config.model.mode:
            raise InputError(f"--draft {args.draft}: its tokenizer and mode must be those of {args.run}.")
        options |= dict(draft=(draft.model, draft.params), draft_tokens=args.draft_tokens)

    streams = args.prompt is not None and args.output is None and not (args.json or args.n_best) and sys.stdout.isatty()
    with partitioner.scope():
        if streams and args.beam_size == args.num_return == 1 and args.draft is None:
            for part in _streamed(run, prompts[0], options):
                print(part, end="", flush=True)
            return 0
        batch_size, lines = min(args.batch_size, len(prompts)), []
        for start in range(0, len(prompts), BATCHES * batch_size):
            block = slice(start, start + BATCHES * batch_size)
            found = answers(
                run.model, run.params, run.tokenizer, prompts[block], batch_size=batch_size, first=start, **options
            )
            for number, (text, each) in enumerate(zip(texts[block], found, strict=True), start + 1):
                lines.append(_printed(number, text, each, run, args, lone=len(prompts) * args.num_return == 1))
            if args.output is None:
                print("".join(lines), end="", flush=True)
                lines.clear()
    if args.output is not None:
        write_output(args.output, "--output", "".join(lines))
    return 0
