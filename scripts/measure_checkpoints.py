"""What hashing costs: `python scripts/measure_checkpoints.py [--megabytes 500] [--folder DIR]`.

Saves and restores a state of that size a few times and prints, as medians, how long training is held up by a save, how
long the save takes behind it, how much of that is the manifest's, how long a check of every hash takes, and how long a
start waits for it, which reads its data meanwhile (the embedded dates). The last column is a share of save and restore.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from transformer_jax import checkpoint
from transformer_jax.checkpoint import Checkpoints, find, restore
from transformer_jax.config import CheckpointConfig
from transformer_jax.data.load import load_data
from transformer_jax.recipes import find_recipe
from transformer_jax.step import TrainState


def state_of(megabytes: int) -> TrainState:
    """Parameters and Adam's two moments, random numbers, which do not compress."""
    width, count = 1024, max(1, megabytes * 10**6 // (3 * 4 * 1024 * 1024))
    keys = jax.random.split(jax.random.key(0), count)
    params = {f"layer_{i}": {"w_DF": jax.random.normal(key, (width, width))} for i, key in enumerate(keys)}
    state = TrainState.create(params, optax.adam(1e-3), 0)
    noise = jax.tree.map(lambda x: x + jax.random.normal(keys[0], x.shape, x.dtype), state.opt_state[0].mu)
    return state.replace(opt_state=(state.opt_state[0]._replace(mu=noise, nu=noise), *state.opt_state[1:]))


def timed(times: list[float], function: Any) -> Any:
    """The function, which notes how long each call takes."""

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - began)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    state = jax.block_until_ready(state_of(args.megabytes))
    times: dict[str, list[float]] = {name: [] for name in ("held", "save", "seal", "check", "data", "open", "restore")}
    dates = find_recipe("dates")
    read = timed(times["data"], lambda _: load_data(dates, None))
    seal = timed(times["seal"], checkpoint.seal)
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, mock.patch.object(checkpoint, "seal", seal):
            began = time.perf_counter()
            with Checkpoints(Path(folder), CheckpointConfig()) as checkpoints:
                checkpoints.open()
                checkpoints.save(repeat, state, {}, {})
                times["held"].append(time.perf_counter() - began)
                checkpoints.wait()
                assert not checkpoints.failures()
            times["save"].append(time.perf_counter() - began)
            step, _ = timed(times["check"], find)(Path(folder))
            with Checkpoints(Path(folder), CheckpointConfig()) as checkpoints:
                timed(times["open"], checkpoints.open)(read)
            template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
            again = timed(times["restore"], restore)(Path(folder) / str(step), template)
            assert all(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.array_equal(x, y), again, state)))
    times["wait"] = [both - alone for both, alone in zip(times["open"], times["data"], strict=True)]
    middle = {name: statistics.median(values) for name, values in times.items()}
    whole = middle["save"] + middle["restore"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(f"| {size:,.0f} MB, {args.repeats} times | seconds | share |\n| --- | --- | --- |")
    for name, text in {
        "held": "training waits for a save",
        "save": "a save, all of it (beside training)",
        "seal": "of that the manifest: syncing and hashing (beside training)",
        "check": "a check of every hash, by itself",
        "data": "a start: reading its data (the hashes are checked meanwhile)",
        "wait": "a start: waiting for the check after that",
        "restore": "a restore: reading the arrays",
    }.items():
        print(f"| {text} | {middle[name]:.2f} | {middle[name] / whole:.0%} |")


if __name__ == "__main__":
    main()
