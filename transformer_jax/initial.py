"""What a run starts from where it is told to: the model, tokenizer and parameters of another run, or of a folder that
`transformers` has saved."""

import dataclasses
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax.axes import letters_of
from transformer_jax.config import ModelConfig, RunConfig, SpecialConfig
from transformer_jax.config_file import read_config
from transformer_jax.data.tokenizer import SOURCE_TOKENIZER, TOKENIZER
from transformer_jax.errors import InputError
from transformer_jax.huggingface.folder import differing, read_json, read_model, what_it_is
from transformer_jax.huggingface.run import load_huggingface, special_tokens_of
from transformer_jax.huggingface.tokenizer import chat_template_of
from transformer_jax.partition import Partitioner
from transformer_jax.run import CHECKPOINTS, CONFIG, ONE_DEVICE, abstract_params, load_run
from transformer_jax.tuning import resized

# What may be another than in the model that a run starts from, besides what changes nothing of what it computes.
FREE = ("vocab_size", "max_length", "rope", "windows")


def is_run(folder: Path) -> bool:
    """Whether a folder is of a run that was trained here."""
    return (folder / CHECKPOINTS).is_dir()


def _source(folder: Path) -> tuple[ModelConfig, SpecialConfig, str]:
    """The model, the special tokens and the template of conversations."""
    if not (folder / CONFIG).exists():
        raise InputError(f"--init-from {folder}: no run's folder, and none of transformers: it has no {CONFIG}.")
    if is_run(folder):
        found = read_config(folder / CONFIG)
        return found.model, found.data.special, found.data.chat_template
    model = read_model(folder)
    return model, special_tokens_of(folder, read_json(folder / CONFIG), model.mode), chat_template_of(folder)


def based_on(run: RunConfig, folder: str) -> RunConfig:
    """A run's settings with the model and the tokenizer of a folder.

    Raises:
        InputError: the folder is none to start from.
    """
    model, special, template = _source(Path(folder))
    tokenizer = Path(folder) / TOKENIZER
    if not tokenizer.exists():
        raise InputError(
            f"--init-from {folder}: there is no {TOKENIZER} in it. Give the folder of a run, which "
            "transformer-jax import makes of it."
        )
    source = Path(folder) / SOURCE_TOKENIZER
    data = dataclasses.replace(
        run.data,
        tokenizer=str(tokenizer),
        source_tokenizer=str(source) if source.exists() else "",
        special=special.for_training,
        objective="auto",
        chat_template=template,
    )
    return dataclasses.replace(run, init_from=folder, model=model, data=data)


def check_model(run: RunConfig) -> None:
    """Raises InputError where a run's model is another one than that which it starts from."""
    there, here = what_it_is(_source(Path(run.init_from))[0]), what_it_is(run.model)
    if other := [name for name in differing(there, here) if name not in FREE]:
        raise InputError(
            f"--init-from {run.init_from}: model.{other[0]} is {getattr(there, other[0])!r} there and "
            f"{getattr(here, other[0])!r} here."
        )


def initial_params(run: RunConfig, partitioner: Partitioner = ONE_DEVICE) -> Any:
    """The parameters that a run starts from, where they live, in the shapes of its model: a vocabulary of another size
    is cut, or grows by rows that are the mean of all.

    Raises:
        InputError: they are those of another model.
    """
    folder = Path(run.init_from)
    if is_run(folder):
        source = load_run(folder, partitioner=partitioner)
    else:
        changes = dict(scan_layers=run.model.scan_layers, param_dtype=run.model.param_dtype)
        source = load_huggingface(folder, partitioner, **changes)
    found: dict[str, Any] = dict(flatten_dict(source.params, sep="/"))
    shapes: dict[str, Any] = dict(flatten_dict(abstract_params(run.model), sep="/"))

    def fitted(path: str, x: Any) -> Any:
        wanted = shapes[path]
        letters = letters_of(path.split("/"), wanted.ndim)
        if x is not None and x.shape != wanted.shape and "V" in letters:
            x = resized(x, wanted.shape[letters.index("V")], letters.index("V"))
        if x is None or x.shape != wanted.shape:
            have = "not there" if x is None else f"of the shape {list(x.shape)}"
            raise InputError(f"--init-from {folder}: {path} is {have}, where this run has {list(wanted.shape)}.")
        return x.astype(wanted.dtype)

    def all_of_them(found: dict[str, Any]) -> Any:
        return unflatten_dict({path: fitted(path, found.get(path)) for path in shapes}, sep="/")

    have, want = ({path: (x.shape, x.dtype) for path, x in each.items()} for each in (found, shapes))
    return source.params if have == want else partitioner.made(all_of_them, found)
