"""Checkpoints: the state and what it belongs to, saved together by Orbax, in the background.

All that the project asks of Orbax is in this file.
"""

import json
import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from transformer_jax.errors import CheckpointError
from transformer_jax.step import TrainState

logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of a run, the newest `keep` of them. Close it, or use it in a `with`: saves run behind."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._folder = folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def wait(self) -> None:
        """Until the save in flight is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in flight, then lets go."""
        self.wait()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest step on disk, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Starts to save the state after `step` updates, with facts about the run that a resume must find again."""
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        contents = ocp.args.Composite(facts=ocp.args.JsonSave(facts), **items)
        self._manager.save(step, args=contents)

    def facts(self, step: int) -> dict[str, Any]:
        """The facts that a checkpoint was saved with."""
        return self._restore(step, facts=ocp.args.JsonRestore())["facts"]

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state at a step, in the shapes and places of `state`, which may be abstract.

        Raises:
            CheckpointError: it cannot be read, or it is of another model or optimizer.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(state).items()}
        restored = self._restore(step, **items)
        return state.replace(params=restored["params"], ema=restored.get("ema"), **restored["training"])

    def params(self, step: int, template: Any) -> Any:
        """The parameters alone, the moving average where the run keeps one, in the shapes and places of `template`."""
        name = "ema" if (self._folder / str(step) / "ema").exists() else "params"
        return self._restore(step, **{name: ocp.args.StandardRestore(template)})[name]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            reason = str(error).splitlines()[0][:300]
            raise CheckpointError(f"{self._folder / str(step)}: the checkpoint cannot be restored: {reason}") from error


def _items(state: TrainState) -> dict[str, Any]:
    """The state in parts that can be read one without the other, as plain dicts."""
    training = {"step": state.step, "opt_state": state.opt_state, "seed": state.seed}
    return {"params": state.params, "training": training} | ({} if state.ema is None else {"ema": state.ema})
