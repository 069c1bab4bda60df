"""A folder of Hugging Face as a run, and a run as such a folder."""

import dataclasses
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.config import DataConfig, ModelConfig, RunConfig, SpecialConfig
from transformer_jax.config_checks import nearest as near
from transformer_jax.config_checks import shown
from transformer_jax.data.chat import DEFAULT
from transformer_jax.data.load import prompts_of
from transformer_jax.data.objectives import ARRANGEMENTS, objective_name
from transformer_jax.data.tokenizer import tokenizer_of
from transformer_jax.errors import InputError
from transformer_jax.evaluate import decoding_options
from transformer_jax.huggingface.families import FAMILIES
from transformer_jax.huggingface.folder import (
    CONFIG,
    MisfitError,
    read_json,
    read_pretrained,
    write_config,
    write_pretrained,
)
from transformer_jax.huggingface.tokenizer import SETTINGS, TOKENIZER, chat_template_of, tokenizer_json
from transformer_jax.model.transformer import Transformer
from transformer_jax.partition import Partitioner
from transformer_jax.run import ONE_DEVICE, Run

GENERATION = "generation_config.json"
PROBES = string.ascii_letters + string.digits  # texts, the encoding of one of which is looked for in a prompt


def special_tokens(config: Mapping[str, Any], generation: Mapping[str, Any], mode: str) -> SpecialConfig:
    """Which id has which role; what a decoder starts with is `bos`. Of several ends the first is that of a text.

    Raises:
        InputError: an id is none.
    """
    both = {**config, **{name: value for name, value in generation.items() if value is not None}}
    names = {"pad": "pad_token_id", "eos": "eos_token_id", "bos": "bos_token_id", "first": "forced_bos_token_id"}
    if ARRANGEMENTS[mode].has_source:
        names["bos"] = "decoder_start_token_id"
    found: dict[str, Any] = {role: both.get(name) for role, name in names.items()}
    several = {role: each if isinstance(each, list) else [each] for role, each in found.items() if each is not None}
    for role, each in several.items():
        if not each or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in each):
            raise InputError(f"{names[role]}={shown(found[role])} must be the id of a token.")
    first = {role: each[0] for role, each in several.items()}
    return SpecialConfig(**first, stops=tuple(several.get("eos", [])[1:]), prompts="tokenizer")


def special_tokens_of(folder: Path, config: Mapping[str, Any], mode: str) -> SpecialConfig:
    """`special_tokens` of a folder."""
    generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    return special_tokens(config, generation, mode)


def data_of(model: ModelConfig, special: SpecialConfig) -> DataConfig:
    """What a run of a published model says of its data: pairs where there is an encoder, else plain text."""
    kind = "pairs" if ARRANGEMENTS[model.mode].has_source else "text"
    objective: Any = objective_name(kind, model, DataConfig())
    return DataConfig(objective=objective, special=special)


def load_huggingface(folder: str | Path, partitioner: Partitioner = ONE_DEVICE, **changes: Any) -> Run:
    """A model that `transformers` has saved, as `load_run` gives one that was trained here.

    Args:
        folder: with config.json and its weights in safetensors; with tokenizer.json, or a SentencePiece model, the run
            has its tokenizer, else None.
        partitioner: says where parameters live.
        changes: of fields that change how the model is computed, such as scan_layers or dtype.

    Raises:
        InputError: anything in it is not understood, missing, left over or damaged; the message names it.
    """
    folder = Path(folder)
    model, params = read_pretrained(folder, partitioner, **changes)
    found = read_json(folder / CONFIG)
    special = special_tokens_of(folder, found, model.mode)
    data = dataclasses.replace(data_of(model, special), chat_template=chat_template_of(folder))
    tokenizer: Any = None
    text = tokenizer_json(folder, found["model_type"])
    if text is not None:
        tokenizer = tokenizer_of(text, name=f"{folder}: its tokenizer", special=special.ids)
    config = RunConfig(recipe=folder.name, model=model, data=data)
    return Run(config, Transformer(model), params, tokenizer, 0)


def family_of(run: Run, family: str = "") -> str:
    """The family of that name; none given is the first whose models are like this one.

    Raises:
        InputError: there is none; the message says what stands in the way of the nearest.
    """
    if family:
        if family not in FAMILIES:
            raise InputError(f"family={family!r} must be one of {', '.join(FAMILIES)}.{near(family, FAMILIES)}")
        return family
    nearest: tuple[int, str] | None = None
    for kind in FAMILIES:
        try:
            write_config(kind, run.config.model)
            return kind
        except MisfitError as error:
            nearest = min(nearest or (error.fields, str(error)), (error.fields, str(error)))
        except InputError:
            continue
    raise InputError(f"No family of transformers has such a model. {nearest[1] if nearest else ''}".rstrip())


def _around(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The ids in front of and behind a text in what the model is prompted with. Of conversations the text is all of
    one, as their template has it."""
    if run.config.data.objective == "chat":
        behind = [run.tokenizer.eos_id] * ARRANGEMENTS[run.config.model.mode].has_source
        return np.array([], np.int32), np.array(behind, np.int32)
    text = next((text for text in PROBES if len(run.tokenizer.encode([text])[0])), None)
    if text is None:
        raise InputError("The tokenizer has no token for any letter or digit, so its prompts cannot be told.")
    source, seen = prompts_of([text], run.config, run.tokenizer)[0]
    prompt, inside = seen if source is None else source, run.tokenizer.encode([text])[0]
    place = next(i for i in range(len(prompt)) if np.array_equal(prompt[i : i + len(inside)], inside))
    return prompt[:place], prompt[place + len(inside) :]


def as_published(run: Run) -> dict[str, str]:
    """The tokenizer's files, whose encoding of a text is what the model is prompted with."""
    tokenizer = run.tokenizer
    text, names = tokenizer.to_json(), {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos", "unk")}
    if run.config.data.special.prompts == "roles":
        import tokenizers as tk

        before, behind = _around(run)
        around = [tokenizer.tokens(part) for part in (before, behind)]
        special = [(name, tokenizer.inner.token_to_id(name)) for name in dict.fromkeys(around[0] + around[1])]
        if missing := [name for name, number in special if number is None]:
            raise InputError(f"The tokenizer has no token for {missing[0]}, which prompts of this run have.")
        inner = tk.Tokenizer.from_str(text)
        inner.post_processor = tk.processors.TemplateProcessing([*around[0], "$A", *around[1]], None, special)
        text = inner.to_str(pretty=True)
    settings = {f"{role}_token": tokenizer.tokens([number])[0] for role, number in names.items()}
    if run.config.data.objective == "chat":
        settings["chat_template"] = run.config.data.chat_template or DEFAULT
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": run.config.model.max_length}
    return {TOKENIZER: text, SETTINGS: json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"}


def save_huggingface(folder: str | Path, run: Run, family: str = "") -> None:
    """A run as a folder that `transformers` loads: config.json, model.safetensors and tokenizer.json.

    Args:
        folder: is made; files of these names in it are replaced.
        run: what `load_run` or `load_huggingface` returns.
        family: a `model_type`; none given is the first that has such models.

    Raises:
        InputError: no family has such a model, or not this one; the message names the fields that stand in the way.
    """
    family = family_of(run, family)
    folder, tokenizer, ids = Path(folder), run.tokenizer, {}
    both = ARRANGEMENTS[run.config.model.mode].has_source
    if tokenizer is not None:
        ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
        ids |= {"decoder_start_token_id": tokenizer.bos_id} if both else {}
    more: Any = {"is_encoder_decoder": True} if both else {}
    write_pretrained(folder, family, run.config.model, run.params, **ids, **more)
    if tokenizer is not None:
        texts, special = as_published(run), run.config.data.special
        ids |= {} if special.first is None else {"forced_bos_token_id": special.first}
        ends = list(dict.fromkeys(decoding_options(run.config, tokenizer)["eos_id"]))
        ids |= {"eos_token_id": ends} if len(ends) > 1 else {}
        texts |= {GENERATION: json.dumps(ids, indent=2, sort_keys=True) + "\n"}
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
