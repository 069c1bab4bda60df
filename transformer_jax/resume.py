"""What a run's folder holds against what the command asks for: the same run goes on, another one is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformer_jax import job
from transformer_jax.checkpoint import Checkpoints, Rejected, facts_of
from transformer_jax.config import RunConfig
from transformer_jax.config_file import differences, read_config
from transformer_jax.data.load import Data, load_data
from transformer_jax.data.tokenizer import (
    TOKENIZER,
    TRAINERS,
    Tokenizer,
    papers_of,
    read_tokenizer,
    tokenizer_of_papers,
)
from transformer_jax.errors import InputError
from transformer_jax.folders import write_whole
from transformer_jax.run import CONFIG


class Found(NamedTuple):
    """Where a run begins.

    Attributes:
        data: all that it reads, with its settings filled in.
        step: the checkpoint to go on from, None at the very start.
        rejected: damaged checkpoints that were set aside.
        changes: what differs from the run in the folder, and was accepted.
    """

    data: Data
    step: int | None
    rejected: list[Rejected]
    changes: list[str]


def find_run(run: RunConfig, folder: Path, checkpoints: Checkpoints) -> Found:
    """The run that is in a folder, if any, and its data.

    The newest sound checkpoint says what the run is; before there is one, the folder's own papers do.

    Raises:
        InputError: the run there has another config, data or tokenizer, and `accept_changes` is not set; or the data
            cannot be used.
        CheckpointError: there are checkpoints and none is sound.
    """

    def read(step: int | None) -> tuple[int | None, Path, RunConfig | None, Data]:
        unit = folder if step is None else checkpoints.unit(step)
        before = read_config(unit / CONFIG) if (unit / CONFIG).exists() else None
        return step, unit, before, read_together(run, _tokenizer(run, before, folder, unit))

    (step, unit, before, data), rejected = checkpoints.open(read)
    was = {} if step is None else facts_of(unit).get("data", {})
    changes = differences(before, data.config, moved=bool(was)) if before else []
    changes += [
        f"{name}: {was[name]} -> {data.fingerprint[name]}" for name in was if was[name] != data.fingerprint[name]
    ]
    if changes and not run.accept_changes:
        raise InputError(
            f"{folder} holds a run with another config, data or tokenizer: {'; '.join(changes)}. Give another "
            "--workdir, remove this one to start over, or go on all the same by `transformer-jax train` with "
            "--accept-changes True."
        )
    return Found(data, step, rejected, changes)


def _tokenizer(run: RunConfig, before: RunConfig | None, folder: Path, unit: Path) -> Tokenizer | None:
    """The tokenizer of the run in the folder; None where it has to be made, or read from the user's file, anew.

    The folder's own comes first: where it is not the checkpoint's, it was changed.
    """
    names = [run.data.tokenizer, *filter(None, [run.data.source_tokenizer])]
    old = before and [before.data.tokenizer, *filter(None, [before.data.source_tokenizer])]
    if old != names or any(name not in TRAINERS and Path(name).exists() for name in names):
        return None
    return read_tokenizer(folder if (folder / TOKENIZER).exists() else unit, run.data.special.ids)


def read_together(run: RunConfig, tokenizer: Tokenizer | None) -> Data:
    """The run's data. Of several processes the first makes the tokenizer, and all must read the same."""
    if job.count() == 1:
        return load_data(run, tokenizer)
    data = load_data(run, tokenizer) if job.is_first() else None
    text = job.shared(json.dumps(papers_of(data.tokenizer)) if data else None)
    data = data or load_data(run, tokenizer or tokenizer_of_papers(json.loads(text), run.data.special.ids))
    job.check_same("The data", json.dumps(data.fingerprint))
    return data


def write_papers(folder: Path, papers: Mapping[str, str]) -> None:
    """Writes the run's papers, the config last: where it is, the others are.

    Raises:
        InputError: this process does not see what the first one wrote.
    """
    for name, text in papers.items() if job.is_first() else ():
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            write_whole(path, text)
    job.wait("papers written")
    if not (folder / CONFIG).exists():
        raise InputError(
            f"--workdir {folder}: process {job.number()} does not see what process 0 wrote there; all processes need "
            "one shared folder."
        )
