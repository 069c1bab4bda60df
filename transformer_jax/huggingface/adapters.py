"""LoRA's adapters as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors."""

import json
import re
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from transformer_jax.axes import letters_of, sizes
from transformer_jax.errors import InputError
from transformer_jax.huggingface.families import FAMILIES
from transformer_jax.huggingface.folder import shapes_of, write_config
from transformer_jax.huggingface.rows import Piece, pieces
from transformer_jax.run import Run
from transformer_jax.safetensors_file import write_safetensors
from transformer_jax.tuning import RANK, A, B, sides

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"decoder-only": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}


def _thin(
    piece: Piece, a: np.ndarray, b: np.ndarray, letters: str, length: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """([rank, inputs], [outputs, rank], whether their weight has its inputs first) of a weight with these letters."""
    from einops import rearrange

    _, inputs, outputs = sides(letters)
    first, second = re.findall(r"\([^)]*\)|\w", piece.row.layouts[0])
    turned = set(re.sub(r"\W", "", first)) <= set(inputs)
    theirs = (first, second) if turned else (second, first)
    known = [{letter: length[letter] for letter in each} for each in (inputs, outputs)]
    thin = rearrange(a, f"{' '.join(inputs)} {RANK} -> {RANK} {theirs[0]}", **known[0])
    return thin, rearrange(b, f"{RANK} {' '.join(outputs)} -> {theirs[1]} {RANK}", **known[1]), turned


def write_adapters(folder: Path, kind: str, run: Run) -> None:
    """Saves a run's adapters alone, for the model that they were trained beside.

    Raises:
        InputError: the run has none, or the family keeps several weights that have one as a single tensor.
    """
    if run.adapters is None:
        raise InputError("--adapter: the run has no adapters; it was trained without --tuning.lora.")
    config, flat = run.config.model, dict(flatten_dict(run.adapters, sep="/"))
    write_config(kind, config)
    length, shapes, left = sizes(config), shapes_of(config), {path.rpartition("/")[0] for path in flat}
    tensors, ranks, turned = {}, {}, False
    for piece in pieces(FAMILIES[kind].rows_of(config), config, shapes):
        path, index = piece.places[0]
        modules = {place.rpartition("/")[0] for place, _ in piece.places}
        if not path.rpartition("/")[2].startswith("w_") or not any(f"{module}/{A}" in flat for module in modules):
            continue
        if len(piece.places) > 1:
            joint = ", ".join(sorted(modules))
            raise InputError(f"--adapter: {kind} has {joint} in one tensor. Export the merged model.")
        module, name = path.rpartition("/")[0], piece.name.removesuffix(".weight")
        a, b = (np.asarray(flat[f"{module}/{each}"][index]) for each in (A, B))
        thin = _thin(piece, a, b, letters_of(path.split("/"), len(shapes[path].shape)), length)
        for which, tensor in zip("AB", thin[:2], strict=True):
            tensors[f"base_model.model.{name}.lora_{which}.weight"] = tensor
        ranks[name], turned = thin[0].shape[0], turned or thin[2]
        left.discard(module)
    if left:
        raise InputError(f"--adapter: {kind} has no weight of its own for {sorted(left)[0]}. Export the merged model.")
    rank, alpha = next(iter(ranks.values())), run.config.tuning.lora_alpha
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS[config.mode],
        "base_model_name_or_path": run.config.init_from,
        "r": rank,
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
