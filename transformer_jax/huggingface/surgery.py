"""A model of one mode made of one of the other, as T5Gemma was (Zhang et al. 2025): what is there is kept, and what is
not begins as the part that is most like it."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax.config_model import Mode
from transformer_jax.errors import InputError
from transformer_jax.huggingface.run import data_of
from transformer_jax.model.transformer import Transformer
from transformer_jax.run import Run, abstract_params

# What a part begins as where the model has none of it, in turn.
LIKE = (("cross_attention", "self_attention"), ("encoder/", "decoder/"), ("source_embedding", "embedding"))


def source_of(path: str, have: Mapping[str, Any]) -> str:
    """The path of the parameter that another one begins as. Raises InputError where there is none."""
    likes = itertools.accumulate(LIKE, lambda like, parts: like.replace(*parts), initial=path)
    found = next((like for like in likes if like in have), None)
    if found is None:
        raise InputError(f"--as: the model has nothing that {path} could begin as.")
    return found


def _some(path: str) -> str:
    """A path with all blocks as one."""
    part = path.rpartition("/")[0] if path.count("/") > 1 else path
    return re.sub(r"block_\d+", "block_*", part)


def turned(run: Run, mode: Mode) -> Run:
    """The model in another mode; prints which part begins as which, and what is left out.

    Raises:
        InputError: it is of that mode, or has no part that another one could begin as.
    """
    model = run.config.model
    if model.mode == mode:
        raise InputError(f"--as {mode}: that is the mode of this model.")
    config = model.replace(mode=mode, num_encoder_layers=model.num_layers)
    have: dict[str, Any] = dict(flatten_dict(run.params, sep="/"))
    wanted: dict[str, Any] = dict(flatten_dict(abstract_params(config), sep="/"))
    sources = {path: source_of(path, have) for path in wanted}
    for path, source in sources.items():
        if have[source].shape != wanted[path].shape:
            raise InputError(
                f"--as {mode}: {path} is {list(wanted[path].shape)} and {source} {list(have[source].shape)}."
            )
    for part, other in dict.fromkeys((_some(path), _some(source)) for path, source in sources.items()):
        print(f"  {part} <- {other}" if part != other else f"  {part}")
    for left in dict.fromkeys(_some(path) for path in have if path not in sources.values()):
        print(f"  left out: {left}")
    params = unflatten_dict({path: have[source] for path, source in sources.items()}, sep="/")
    data = data_of(config, run.config.data.special.for_training)
    settings = dataclasses.replace(run.config, model=config, data=data)
    return dataclasses.replace(run, config=settings, model=Transformer(config), params=params)
