"""What the configs of several families of decoder-only models have in common: sizes, rope, windows."""

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import Json, Key

DECODER: Json = dict(mode="decoder-only", scale_embeddings=False, scan_layers=False)
SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("intermediate_size", "d_ff"),
    Key("max_position_embeddings", "max_length"),
)
BLOCK = "decoder/block_{i}"


# --- rope


# the names of a kind of scaling's numbers there and here
SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "beta_slow": "low",
        "beta_fast": "high",
        "original_max_position_embeddings": "original_length",
    },
}


def read_rope(config: Json, fields: Json, base: float = 10_000.0, fraction: float | None = None) -> Json:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before.

    Args:
        config: what is left of config.json.
        fields: ours so far.
        base: where config.json names none.
        fraction: the same; None where the family always turns the whole head.
    """
    found = {name: config.pop(name, None) for name in ("rope_theta", "partial_rotary_factor")}
    found |= config.pop("rope_parameters", None) or {}
    found |= config.pop("rope_scaling", None) or {}
    theta, share = found.pop("rope_theta"), found.pop("partial_rotary_factor")
    if fraction is None and share not in (None, 1):
        raise InputError(f"partial_rotary_factor={shown(share)} is not known for this family, only 1.")
    rope = {"base": float(base if theta is None else theta)}
    rope["fraction"] = float((fraction or 1) if share is None else share)
    return {"rope": rope | _read_scaling(found, fields)}


def _read_scaling(found: Json, fields: Json) -> Json:
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if kind not in SCALINGS:
        raise InputError(f"rope_type {shown(kind)} must be one of {', '.join(SCALINGS)}.")
    rope: Json = {} if kind == "default" else {"scaling": kind}
    if kind == "yarn":
        rope |= dict(low=1.0, high=32.0, original_length=fields["max_length"])
    for theirs, ours in SCALINGS[kind].items():
        if theirs in found:
            value = found.pop(theirs)
            rope[ours] = int(value) if ours == "original_length" else float(value)
        elif ours not in rope:
            raise InputError(f"rope of type {kind} has no {theirs!r}.")
    if found:
        raise InputError(f"rope of type {kind}: unknown {', '.join(map(shown, found))}.")
    return rope


def write_rope(config: ModelConfig) -> Json:
    """What `read_rope` reads; a fraction of 1 is what all but a few families have, and is not written."""
    rope, kind = config.rope, "default" if config.rope.scaling == "none" else config.rope.scaling
    found = {"rope_type": kind, "rope_theta": rope.base}
    found |= {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    found |= {theirs: getattr(rope, ours) for theirs, ours in SCALINGS.get(kind, {}).items()}
    return {"rope_parameters": found}


# --- windows


def read_windows(config: Json, fields: Json) -> tuple[int, ...]:
    """`sliding_window` on the layers that `layer_types` names; without it, on those from `max_window_layers` on."""
    window, kinds = config.pop("sliding_window", None) or 0, config.pop("layer_types", None)
    first, used = config.pop("max_window_layers", 0), config.pop("use_sliding_window", False)
    layers = fields["num_layers"]
    if kinds is None:
        first = min(first, layers) if used and window else layers
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if len(kinds) != layers:
        raise InputError(f"layer_types has {len(kinds)} layers, and num_hidden_layers is {layers}.")
    known = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise InputError(f"layer_types has {shown(kind)}; known are {', '.join(known)}.")
    return shortest([known[kind] for kind in kinds])


def shortest(windows: list[int]) -> tuple[int, ...]:
    """The shortest pattern of which the windows are whole repeats."""
    for period in range(1, len(windows) + 1):
        if len(windows) % period == 0 and windows == windows[:period] * (len(windows) // period):
            return tuple(windows[:period])
    return tuple(windows)


def write_windows(config: ModelConfig) -> Json:
    windows = [config.windows[i % len(config.windows)] for i in range(config.num_layers)]
    size = max(windows)
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": size or None, "layer_types": kinds}
