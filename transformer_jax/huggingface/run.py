"""A folder of Hugging Face as a run, and a run as such a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from transformer_jax.config import DataConfig, RunConfig
from transformer_jax.data.objectives import objective_name
from transformer_jax.data.tokenizer import MOST_BYTES, tokenizer_of
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole
from transformer_jax.huggingface.families import FAMILIES
from transformer_jax.huggingface.folder import CONFIG, read_json, read_pretrained, write_config, write_pretrained
from transformer_jax.model.transformer import Transformer
from transformer_jax.run import Run

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"


def special_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, int]:
    """Which id has which role; what a decoder starts with is `bos`. Several ends count as the first of them."""
    both = {**config, **{name: value for name, value in generation.items() if value is not None}}
    names = {"pad": "pad_token_id", "eos": "eos_token_id", "bos": "bos_token_id"}
    if config.get("is_encoder_decoder"):
        names["bos"] = "decoder_start_token_id"
    found = {role: both.get(name) for role, name in names.items()}
    found = {role: each[0] if isinstance(each, list) and each else each for role, each in found.items()}
    return {role: each for role, each in found.items() if isinstance(each, int) and not isinstance(each, bool)}


def load_huggingface(folder: str | Path, **changes: Any) -> Run:
    """A model that `transformers` has saved, as `load_run` gives one that was trained here.

    Args:
        folder: with config.json and its weights in safetensors; with tokenizer.json the run has its tokenizer, else
            None.
        changes: of fields that change how the model is computed, such as scan_layers or dtype.

    Raises:
        InputError: anything in it is not understood, missing, left over or damaged; the message names it.
    """
    folder = Path(folder)
    model, params = read_pretrained(folder, **changes)
    found = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    tokenizer: Any = None
    if (folder / TOKENIZER).exists():
        path = folder / TOKENIZER
        text = decode(path, read_whole(path, MOST_BYTES))
        tokenizer = tokenizer_of(text, name=str(path), special=special_ids(found, generation))
    kind = "pairs" if model.mode == "encoder-decoder" else "text"
    objective: Any = objective_name(kind, model, DataConfig())
    data = DataConfig(objective=objective)
    config = RunConfig(recipe=folder.name, model=model, data=data)
    return Run(config, Transformer(model), jax.tree.map(jax.numpy.asarray, params), tokenizer, 0)


def family_of(run: Run) -> str:
    """The first family whose models are like this one.

    Raises:
        InputError: there is none; the message says what stands in the way of the nearest.
    """
    reasons = []
    for kind in FAMILIES:
        try:
            write_config(kind, run.config.model)
            return kind
        except InputError as error:
            reasons.append(str(error))
    raise InputError(f"No family of transformers has such a model. {min(reasons, key=len)}")


def save_huggingface(folder: str | Path, run: Run, family: str = "") -> None:
    """A run as a folder that `transformers` loads: config.json, model.safetensors and tokenizer.json.

    Args:
        folder: is made; files of these names in it are replaced.
        run: what `load_run` or `load_huggingface` returns.
        family: a `model_type`; none given is the first that has such models.

    Raises:
        InputError: no family has such a model, or not this one; the message names the fields that stand in the way.
    """
    if family and family not in FAMILIES:
        raise InputError(f"family={family!r} must be one of {', '.join(FAMILIES)}.")
    folder, tokenizer, ids = Path(folder), run.tokenizer, {}
    if tokenizer is not None:
        ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
        if run.config.model.mode == "encoder-decoder":
            ids |= {"decoder_start_token_id": tokenizer.bos_id, "is_encoder_decoder": True}
    write_pretrained(folder, family or family_of(run), run.config.model, run.params, **ids)
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer.to_json(), "utf-8")
