"""Data -> tokens -> a trained run -> the mean of its last checkpoints -> the figure. Each stage is made once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformer_jax.average import save_average
from transformer_jax.checkpoint import best_step, steps_in
from transformer_jax.config import DataConfig, ParallelConfig, RunConfig
from transformer_jax.data.sources import load_all, read
from transformer_jax.errors import InputError
from transformer_jax.evaluate import evaluate_run
from transformer_jax.loop import STOPPED, train
from transformer_jax.recipes import find_recipe
from transformer_jax.reproduce import Published
from transformer_jax.run import CHECKPOINTS, Run, load_run
from transformer_jax.terminal import Terminal
from transformer_jax.translation.moses import convert, tokenizing
from transformer_jax.translation.scores import AS_THEY_ARE, TOKENIZED_BLEU

PACKINGS = ("", ".gz", ".zst")
Say = Callable[[str], None]


def files_in(folder: Path, published: Published) -> dict[str, tuple[Path, Path]]:
    """Source and target of each part of the data.

    Raises:
        InputError: a file is missing.
    """
    found = {}
    for part, names in published.files.items():
        paths = []
        for name in names:
            there = [path for path in (folder / f"{name}{packing}" for packing in PACKINGS) if path.is_file()]
            if not there:
                raise InputError(f"--data {folder}: has no {name}, plain or .gz. It must be {published.data}.")
            paths.append(there[0])
        found[part] = tuple(paths)
    return found


def settings(
    published: Published, data: Path, workdir: Path, seed: int, parallel: ParallelConfig, say: Say
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run, and what it is scored on: source and target, or nothing where that is its validation data.

    Pairs that are to be tokens of Moses are written as such into the folder.

    Raises:
        InputError: the data is missing or cannot be read.
    """
    run = dataclasses.replace(find_recipe(published.recipe), workdir=str(workdir), seed=seed, parallel=parallel)
    if not published.files:
        return _reading(run, (data,)), ()
    if not data.is_dir():
        raise InputError(f"--data {data}: is no folder. It must be {published.data}.")
    found = files_in(data, published)
    if published.moses:
        say(f"lower-cased tokens of Moses, into {workdir / 'tokens'}")
        found = {part: _tokens(paths, workdir / "tokens", published.moses) for part, paths in found.items()}
    return _reading(run, found["train"], found["validation"]), tuple(map(str, found["test"]))


def _reading(run: RunConfig, train: tuple[Path, ...], validation: tuple[Path, ...] = ()) -> RunConfig:
    data: DataConfig = dataclasses.replace(
        run.data, train=tuple(map(str, train)), validation=tuple(map(str, validation))
    )
    return dataclasses.replace(run, data=data)


def _tokens(paths: tuple[Path, Path], folder: Path, languages: tuple[str, ...]) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path, language in zip(paths, languages, strict=True):
        target = folder / path.name.removesuffix(".gz").removesuffix(".zst")
        convert(path, target, tokenizing(language, normalize=True, lowercase=True))
        made.append(target)
    return tuple(made)


def measure(published: Published, run: RunConfig, test: tuple[str, ...], terminal: Terminal) -> dict[str, Any] | None:
    """Trains, or goes on, and scores what comes of it. None where an end was asked for by a signal or the clock.

    Returns:
        How many steps were `trained` and how many `steps` there are, what the scores are `of`, and the `scores`.

    Raises:
        What `train` raises.
    """
    if train(run, terminal) == STOPPED:
        return None
    folder = Path(run.workdir)
    chosen, about = _chosen(published, folder, terminal.say)
    scores: dict[str, Any]
    if test:
        tokenized = AS_THEY_ARE if published.metric == TOKENIZED_BLEU else ""
        names = ("beam_size", "length_penalty", "early_stopping")
        decoding: dict[str, Any] = {name: getattr(published, name) for name in names}
        terminal.say(f"decodes {test[0]} with beam {published.beam_size}")
        scores, _ = evaluate_run(chosen, read(test), tokenized=tokenized, **decoding)
    else:
        scores, _ = evaluate_run(chosen, load_all(chosen.config.data).validation[0])
    trained = steps_in(folder / CHECKPOINTS)[-1]
    return {"trained": trained, "steps": run.steps, "of": about, "scores": scores}


def _chosen(published: Published, folder: Path, say: Say) -> tuple[Run, str]:
    """What is scored, and which that is."""
    if not published.averaged:
        which = "newest" if best_step(folder / CHECKPOINTS, "loss") is None else "best"
        run = load_run(folder, which)
        return run, f"the {which} checkpoint, of step {run.step}"
    steps = averaged_steps(folder / CHECKPOINTS, published.averaged, find_recipe(published.recipe).checkpoint.every)
    target = folder / f"averaged-{steps[-1]}"
    if not target.exists():
        say(f"the mean of {len(steps)} checkpoints, into {target}")
        save_average(folder, target, steps)
    return load_run(target), f"the mean of {len(steps)} checkpoints, {steps[0]} to {steps[-1]}"


def averaged_steps(checkpoints: Path, count: int, every: int) -> list[int]:
    """The last steps that are a multiple of `every`, such as the ends of epochs.

    What was saved in between, as the run ended there or was evaluated, is none, but where there is nothing else.
    """
    steps = steps_in(checkpoints)
    return [step for step in steps if step % every == 0][-count:] or steps[-1:]
