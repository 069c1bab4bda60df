"""The command line: `transformer-jax COMMAND ...`. Wrong input ends with one message on stderr and status 2."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from transformer_jax.average import command_average
from transformer_jax.bench.command import command_bench
from transformer_jax.compare.command import command_compare
from transformer_jax.config import RunConfig
from transformer_jax.config_checks import at_least, nearest
from transformer_jax.config_file import flat, opened, read_config
from transformer_jax.errors import ERRORS, InputError
from transformer_jax.files import check_output, decode, write_output
from transformer_jax.flags import RunFolder, papers, parse
from transformer_jax.generate_command import command_generate
from transformer_jax.huggingface.command import command_export, command_import
from transformer_jax.prepare_command import command_prepare
from transformer_jax.recipes import RECIPES, find_recipe
from transformer_jax.report.command import command_report
from transformer_jax.reproduce.command import command_reproduce
from transformer_jax.translation.moses import command_moses
from transformer_jax.translation.scores import measures
from transformer_jax.translation.significance import command_significance
from transformer_jax.translation.sweep import command_sweep


def _take(flag: str, what: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The value of a flag that decides what the others begin with, and the other arguments."""
    rest, found, words = [], "", iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise InputError(f"{flag} needs a {what}.")
        if found:
            raise InputError(f"{flag} {value}: give one {what}, not several.")
        found = value
    return found, rest


def _as(kind: type[RunConfig], run: RunConfig) -> RunConfig:
    """The same settings with those that `kind` adds to them at their defaults."""
    return kind(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})


def parse_run(arguments: list[str], command: str = "train", kind: type[RunConfig] = RunConfig) -> Any:
    """`[RECIPE] [--config FILE] [flags]` as a run's settings; a `kind` of them has flags of its own as well.

    Raises:
        InputError: the recipe or the config file is wrong. A wrong flag ends the process with status 2.
    """
    path, arguments = _take("--config", "file", arguments)
    start, arguments = _take("--init-from", "folder", arguments)
    saved = read_config(path) if path else None
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if saved is not None and name:
        raise InputError(f"Give a recipe ({name}) or --config, not both.")
    if arguments and not arguments[0].startswith("-"):
        raise InputError(f"Give one recipe ({name}), then flags; got {arguments[0]!r} after it.")
    if name not in RECIPES and ("/" in name or (name and Path(name).is_dir())):
        settings = f"{command} takes a recipe, not a folder; a run's settings are --config {Path(name) / 'config.json'}"
        raise InputError(f"{name}: {'not a run: it has no config.json' if command == 'describe' else settings}.")
    base = saved if saved is not None else find_recipe(name or "dates")
    if start:
        from transformer_jax.initial import based_on

        base = based_on(base, start)
    about = RECIPES[base.recipe].__doc__ if base.recipe in RECIPES else ""
    usage = f"Recipe {base.recipe}. {about}\n\nRecipes: {', '.join(RECIPES)}. --config FILE reruns a saved config.json."
    run = parse(kind, f"transformer-jax {command} [RECIPE]", arguments, usage, opened(_as(kind, base)))
    if run.recipe != base.recipe:
        raise InputError(f"--recipe only names a run; for that recipe write: transformer-jax {command} {run.recipe}")
    if run.workdir:
        return run
    if not re.fullmatch(r"\w[\w.-]*", run.recipe):
        raise InputError(f"recipe={run.recipe!r} cannot name a folder: give --workdir.")
    folder = f"runs/{run.recipe}" if run.model.mode == base.model.mode else f"runs/{run.recipe}-{run.model.mode}"
    return dataclasses.replace(run, workdir=folder)


def command_train(arguments: list[str]) -> int:
    """trains; the same command on the same --workdir resumes"""
    run = parse_run(arguments)
    from transformer_jax import job
    from transformer_jax.host import prepare
    from transformer_jax.loop import train
    from transformer_jax.terminal import Terminal

    prepare(run.deterministic)
    job.join(run.parallel)
    return train(run, Terminal(speaks=job.is_first()))


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    run: RunFolder
    """A run's folder."""
    data: tuple[Path, ...]
    """One path, or two parallel files, as --data.train takes them."""
    checkpoint: str = "newest"
    """The checkpoint to read: newest, best (as --checkpoint.best of the run says), or a step."""
    limit: int = 0
    """Decode so many pairs at most; 0 is all. The loss is always over all of the data."""
    batch_size: int = 0
    """Rows computed together; 0 is the run's."""
    output: Path | None = None
    """Where the outputs for pairs go, one a line."""
    score: bool = False
    """Print the log-probability of each given target or text instead, in nats, one a line."""
    beam_size: int = 1
    """Width of the beam search for the outputs; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent on the length that a beam's score is divided by."""
    early_stopping: bool = False
    """End a beam search once beam-size outputs have ended, as fairseq does, not where no other can become better."""
    tokenized_bleu: str = ""
    """For pairs, score BLEU of lower-cased tokens too, which is what many papers give and is not comparable with
    bleu: of Moses's tokens for this language (de, en, ...), or none: of texts as they are, where they are tokens."""
    int8_cache: bool = False
    """Decode with keys and values in 8 bits."""
    int8_weights: bool = False
    """Round weights to 8 bits, with a scale for each output: a quarter of float32's memory. All scores are
    of the rounded model."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= 2:
            raise ValueError(f"--data takes one path, or two parallel files; got {len(self.data)}.")
        if self.beam_size < 1:
            raise ValueError(f"beam-size={self.beam_size} must be at least 1.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length-penalty={self.length_penalty} must be finite.")
        if self.early_stopping and self.beam_size == 1:
            raise ValueError("--early-stopping is for a beam search: give a --beam-size above 1.")
        if self.score and (self.output is not None or self.limit):
            raise ValueError("--score is for all given targets and decodes nothing: without --output and --limit.")
        if self.score and self.tokenized_bleu:
            raise ValueError("--score decodes nothing, so --tokenized-bleu has nothing to score.")
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least 0.")


def command_evaluate(arguments: list[str]) -> int:
    """prints a run's scores on data as one JSON object"""
    about = "Prints a run's scores as one JSON object."
    args = parse(EvaluateArguments, "transformer-jax evaluate", arguments, about, switches=True)
    measures(args.tokenized_bleu)
    from transformer_jax.data.sources import files_of, read
    from transformer_jax.evaluate import check_kind, evaluate_run
    from transformer_jax.host import prepare
    from transformer_jax.run import in_int8, load_run

    prepare()
    paths = tuple(map(str, args.data))
    run = load_run(args.run, args.checkpoint)
    corpus = check_kind(run, read(paths))
    if args.tokenized_bleu and corpus.kind != "pairs":
        raise InputError(f"--tokenized-bleu is for pairs, and --data holds {corpus.kind}.")
    if args.int8_weights:
        run = in_int8(run)
    check_output(args.output, "--output", *files_of(paths), *papers(args.run))
    if args.score:
        from transformer_jax.scoring import score_corpus

        batch_size = args.batch_size or run.config.batch_size
        for log_prob in score_corpus(run.model, run.params, corpus, run.config, run.tokenizer, batch_size):
            print(f"{log_prob:.6f}")
        return 0
    names = ("beam_size", "length_penalty", "early_stopping", "int8_cache")
    decoding = {name: getattr(args, name) for name in names}
    scores, outputs = evaluate_run(run, corpus, args.batch_size, args.limit, args.tokenized_bleu, **decoding)
    if args.output is not None:
        write_output(args.output, "--output", "".join(output.replace("\n", "\\n") + "\n" for output in outputs))
    print(json.dumps(scores, indent=2))
    return 0


@dataclasses.dataclass(frozen=True)
class DescribeArguments(RunConfig):
    """A run's settings, and what to plan it for; or a text for which a trained run's attention is drawn."""

    devices: int | None = None
    """Plan before you pay: compile a training step for so many devices, which this machine's CPU plays, split as
    --parallel.mesh says, and print what each of them holds, computes and sends. None: as many as the mesh names."""
    accelerator: str | None = None
    """Plan for this one, such as h100. None: all that are known."""
    examples: int | None = None
    """Print so many training examples instead: what is read, what is given and what is learned."""
    prompt: str | None = None
    """What a trained RUN answers or continues, for --attention."""
    attention: Path | None = None
    """Where a picture (.png, .svg or .pdf) of what every head of RUN looks at meanwhile goes."""
    target: str | None = None
    """For --attention: what RUN says. None: what it finds likeliest, token by token."""
    reads: Annotated[str, tyro.conf.arg(name="checkpoint")] = "newest"
    """For --attention: the checkpoint to read: newest, best (as --checkpoint.best of the run says), or a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "devices", "examples")
        if (self.prompt is None) != (self.attention is None):
            raise ValueError("--prompt and --attention need each other: a text, and where its picture goes.")
        if self.attention is None and (self.target is not None or self.reads != "newest"):
            raise ValueError("--target and --checkpoint are for --attention.")
        if self.attention is not None and self.attention.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--attention {self.attention} must end in .png, .svg or .pdf.")


def _draw_attention(folder: str, saved: RunConfig, args: DescribeArguments) -> int:
    before, own = flat(saved), ("prompt", "attention", "target", "reads")
    for name, value in flat(args).items():
        if name not in own and value != before[name]:
            raise InputError(f"--{name.replace('_', '-')}: not with --attention, which draws a run as it was trained.")
    texts = {"--prompt": args.prompt, "--target": args.target}
    texts = [decode(flag, text.encode(errors="surrogateescape")) for flag, text in texts.items() if text is not None]
    path = args.attention
    assert path is not None
    check_output(path, "--attention", *papers(folder))
    from transformer_jax.pictures import draw, look, summary, write_picture
    from transformer_jax.run import load_run

    run = load_run(folder, args.reads)
    maps = look(run, *texts)
    write_picture(path, "--attention", draw(maps, f"{run.config.recipe}, step {run.step}"))
    print(f"{path}: {summary(maps)}")
    return 0


def _show_examples(run: DescribeArguments, folder: str = "") -> int:
    """Prints what a run is trained on, in the tokens of its folder."""
    from transformer_jax.data.load import load_data
    from transformer_jax.data.shown import show
    from transformer_jax.data.tokenizer import TOKENIZER, read_tokenizer

    known = folder and (Path(folder) / TOKENIZER).exists()
    tokenizer = read_tokenizer(Path(folder), run.data.special.ids) if known else None
    show(load_data(run, tokenizer), run.examples or 0)
    return 0


def command_describe(arguments: list[str]) -> int:
    """prints the model of a recipe or a run as a table, or what devices would hold and do; draws a run's attention"""
    if arguments and not arguments[0].startswith("-") and (Path(arguments[0]) / "config.json").exists():
        saved = _as(DescribeArguments, read_config(Path(arguments[0]) / "config.json"))
        about = f"Describes {arguments[0]}."
        run = parse(DescribeArguments, "transformer-jax describe RUN", arguments[1:], about, opened(saved))
        if run.attention is not None:
            return _draw_attention(arguments[0], saved, run)
        if run.examples is not None:
            return _show_examples(run, arguments[0])
    else:
        run = parse_run(arguments, "describe", DescribeArguments)
        if run.attention is not None:
            raise InputError("--attention draws a trained run: give its folder, not a recipe or --config.")
        if run.examples is not None:
            return _show_examples(run)
    meshed = any(word.partition("=")[0] == "--parallel.mesh" for word in arguments)
    if run.devices is None and run.accelerator is None and not meshed:
        from transformer_jax.describe import describe

        describe(run)
        return 0
    from transformer_jax.accelerators import ACCELERATORS, find_accelerator

    chosen = list(ACCELERATORS.values()) if run.accelerator is None else [find_accelerator(run.accelerator)]
    from transformer_jax.describe import describe_plan, with_vocabulary
    from transformer_jax.plan import make_plan, planned_mesh, simulate, simulated

    devices, run = run.devices, with_vocabulary(run)
    simulate(simulated(planned_mesh(run, devices)))
    describe_plan(run, make_plan(run, devices), chosen)
    return 0


@dataclasses.dataclass(frozen=True)
class VerifyArguments(RunConfig):
    """A run's settings, of which its model and loss are verified."""

    devices: int | None = None
    """Simulate so many devices on the CPU. None: those of this machine."""
    json: Path | None = None
    """Where the outcome goes as JSON, besides the table on stdout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "devices")
        if self.devices is not None and self.devices > 64:
            raise ValueError(f"devices={self.devices} must be at most 64.")


def command_verify(arguments: list[str]) -> int:
    """checks that all strategies, accumulation, scan, remat, packing and cache give the same numbers here"""
    run = parse_run(arguments, "verify", VerifyArguments)
    check_output(run.json, "--json")
    from transformer_jax.verify import report, simulate, verify

    if run.devices is not None:
        simulate(run.devices)
    rows = report(run, verify(run))
    if run.json is not None:
        values = [row._asdict() | {"result": row.result} for row in rows]
        write_output(run.json, "--json", json.dumps(values, indent=2) + "\n")
    return int(any(row.result == "wrong" for row in rows))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": command_train,
    "generate": command_generate,
    "evaluate": command_evaluate,
    "describe": command_describe,
    "report": command_report,
    "import": command_import,
    "export": command_export,
    "average": command_average,
    "sweep": command_sweep,
    "significance": command_significance,
    "moses": command_moses,
    "prepare": command_prepare,
    "compare": command_compare,
    "reproduce": command_reproduce,
    "bench": command_bench,
    "verify": command_verify,
}


def _usage() -> str:
    lines = [f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items()]
    return (
        "usage: transformer-jax COMMAND ...\n\n" + "\n".join(lines) + "\n\ntransformer-jax COMMAND --help says more.\n"
    )


def _printable(text: str) -> str:
    """A message may quote a file, and what a terminal would obey is spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def run_command(arguments: list[str]) -> int:
    """Runs a command line and returns its exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(_usage(), end="")
        return 0
    name, rest = (arguments or [""])[0], arguments[1:]
    try:
        if not name:
            raise InputError(f"COMMAND is missing: one of {', '.join(COMMANDS)}; --help says more.")
        if name not in COMMANDS:
            raise InputError(
                f"Unknown command {name!r}.{nearest(name, COMMANDS)} The commands are {', '.join(COMMANDS)}."
            )
        return COMMANDS[name](rest)
    except ERRORS as error:
        print(f"transformer-jax: {_printable(str(error))}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("transformer-jax: stopped before there was anything to save.", file=sys.stderr)
        return 75


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `transformer-jax`."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))
