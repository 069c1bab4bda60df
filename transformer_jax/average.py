"""Several checkpoints of a run -> one model, the mean of their parameters; and `transformer-jax average`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from transformer_jax.config_checks import at_least
from transformer_jax.errors import InputError
from transformer_jax.flags import RunFolder, parse
from transformer_jax.folders import check_new, made_whole

if TYPE_CHECKING:
    from transformer_jax.run import Run

LAST = 5  # Vaswani et al. 2017, section 6.1, for their base models


@dataclasses.dataclass(frozen=True)
class AverageArguments:
    run: RunFolder
    """A run's folder."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The run's folder that is made, with one checkpoint."""
    last: int | None = None
    """Average so many of the newest checkpoints. With neither this nor --checkpoints: 5."""
    checkpoints: tuple[int, ...] = ()
    """Average the checkpoints of these steps."""

    def __post_init__(self) -> None:
        at_least(self, 1, "last")
        if self.last is not None and self.checkpoints:
            raise ValueError("Give --last or --checkpoints, not both.")
        check_steps(self.checkpoints)


def check_steps(steps: Sequence[int]) -> None:
    """Raises ValueError for a step that is below 0, or given twice and would count twice."""
    for step in steps:
        if step < 0 or list(steps).count(step) > 1:
            raise ValueError(f"checkpoints: {step} is {'below 0' if step < 0 else 'given twice'}.")


def average(folder: str | Path, *, last: int = LAST, checkpoints: Sequence[int] = ()) -> "Run":
    """The run whose parameters are the mean of those that evaluation uses of several checkpoints.

    Checkpoints are read one at a time, beside the mean so far: there are never more than two copies of the parameters.
    Adapters are added to their weights, and what was frozen is as it was: the run is one that is trained as a whole.
    Its step is that of the newest of them.

    Args:
        folder: a run's.
        last: how many of the newest checkpoints.
        checkpoints: the steps of those that are meant instead.

    Raises:
        InputError: the folder is no run's, there are fewer checkpoints, or they are of different models.
        CheckpointError: one of them is damaged.
    """
    import jax
    import jax.numpy as jnp

    from transformer_jax.config import TuningConfig
    from transformer_jax.run import load_run

    about: Any = None
    mean: Any = None
    types: Any = None
    for number, step in enumerate(_chosen(Path(folder), last, checkpoints), 1):
        run = load_run(folder, str(step))
        _check_same(folder, about or run, run)
        mean = moved(mean, run.params, number)
        types = jax.tree.map(lambda x: x.dtype, run.params)
        about = dataclasses.replace(run, params=None, adapters=None)
        del run  # before the next is read
    params = jax.tree.map(lambda x, dtype: jnp.asarray(x.astype(dtype)), mean, types)
    config = dataclasses.replace(about.config, tuning=TuningConfig())
    return dataclasses.replace(about, config=config, params=params)


def moved(mean: Any, params: Any, number: int) -> Any:
    """The mean of `number` trees of arrays, of that of all but the last and of the last; it changes in place.

    It is kept in float32, or in float64 where arrays are. Each move is computed in float64, so the mean of equal arrays
    is these, to the bit.
    """
    import jax
    import numpy as np

    if mean is None:
        return jax.tree.map(lambda x: np.array(x, np.promote_types(x.dtype, np.float32)), params)

    def move(mean: np.ndarray, x: Any) -> None:
        mean += (np.asarray(x, np.float64) - mean) / number

    jax.tree.map(move, mean, params)
    return mean


def _chosen(folder: Path, last: int, checkpoints: Sequence[int]) -> list[int]:
    """The steps to average, ascending."""
    from transformer_jax.checkpoint import steps_in
    from transformer_jax.run import CHECKPOINTS

    check_steps(checkpoints)
    there = steps_in(folder / CHECKPOINTS)
    if not there:
        raise InputError(f"{folder}: not a run's folder, or one without a checkpoint yet.")
    known = f"There {'is' if len(there) == 1 else 'are'} {', '.join(map(str, there))}; a run keeps more of them"
    known += " with --checkpoint.keep N, or those of every N steps with --checkpoint.keep-every N."
    if missing := [step for step in checkpoints if step not in there]:
        raise InputError(f"{folder}: there is no checkpoint {missing[0]}. {known}")
    if not checkpoints and last > len(there):
        raise InputError(f"{folder}: {last} checkpoints are to be averaged, and it has {len(there)}. {known}")
    return sorted(checkpoints) or there[-last:]


def _check_same(folder: str | Path, one: "Run", other: "Run") -> None:
    from transformer_jax.huggingface.folder import differing, what_it_is

    names = differing(what_it_is(one.config.model), what_it_is(other.config.model))
    if one.tokenizer.to_json() != other.tokenizer.to_json():
        names.append("the tokenizer")
    if names:
        raise InputError(f"{folder}: {names[0]} is another at step {one.step} than at step {other.step}.")


def save_average(folder: str | Path, target: Path, steps: Sequence[int]) -> None:
    """A run's folder of the mean of the checkpoints of these steps. Raises what `average` raises, and StorageError."""
    from transformer_jax.run import save_run

    run = average(folder, checkpoints=steps)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, workdir=str(target)))
    with made_whole(target) as work:
        save_run(work, run, {"averaged": {"run": str(folder), "checkpoints": list(steps)}})


def command_average(arguments: list[str]) -> int:
    """makes a run of the mean of several checkpoints: average RUN OUT"""
    about = "Makes a run whose parameters are the mean of those of several checkpoints."
    args = parse(AverageArguments, "transformer-jax average", arguments, about)
    from transformer_jax.host import prepare

    folder = check_new(args.target, "average")
    prepare()
    steps = _chosen(Path(args.run), args.last or LAST, args.checkpoints)
    save_average(args.run, folder, steps)
    print(f"{folder}: the mean of {len(steps)} checkpoints, {', '.join(map(str, steps))}, of {args.run}.")
    return 0
