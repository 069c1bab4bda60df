"""Models that differ in one choice, trained on the same data at a matched budget."""

from typing import Any

Changes = dict[str, Any]  # fields of a recipe's model, by value or as a function of that model

ALONE: Changes = {"mode": "decoder-only", "prefix_attention": "causal"}
BOTH: Changes = {"mode": "encoder-decoder", "prefix_attention": "causal"}
POST: Changes = {"norm_placement": "post", "norm": "layernorm"}
PRE: Changes = {"norm_placement": "pre", "norm": "layernorm"}
RMS: Changes = {"norm_placement": "pre", "norm": "rmsnorm"}
SINUSOIDAL: Changes = {"position": "sinusoidal"}
ROPE: Changes = {"position": "rope"}
RELU: Changes = {"activation": "relu", "gated": False}
SWIGLU: Changes = {"activation": "silu", "gated": True}
MULTI: Changes = {"num_kv_heads": None}
GROUPED: Changes = {"num_kv_heads": lambda model: max(2, model.num_heads // 4)}
SINGLE: Changes = {"num_kv_heads": 1}


def _path(**steps: Changes) -> dict[str, Changes]:
    """Each arm with its change and those of all before it."""
    arms, changes = {}, {}
    for name, step in steps.items():
        changes = changes | step
        arms[name.replace("_", "-")] = changes
    return arms


# What a comparison is between: its arms, and what each changes of a recipe's model.
STUDIES: dict[str, dict[str, Changes]] = {
    "modes": {
        "encoder-decoder": BOTH,
        "decoder-only": ALONE,
        "prefix-lm": ALONE | {"prefix_attention": "bidirectional"},
    },
    "norms": {"post-norm": POST, "pre-norm": PRE, "rmsnorm": RMS},
    "positions": {"sinusoidal": SINUSOIDAL, "rope": ROPE},
    "feed-forward": {"relu": RELU, "swiglu": SWIGLU},
    "heads": {"multi-head": MULTI, "grouped-query": GROUPED, "multi-query": SINGLE},
    "path": _path(
        transformer=BOTH | POST | SINUSOIDAL | RELU | MULTI,
        pre_norm=PRE,
        rmsnorm=RMS,
        rope=ROPE,
        swiglu=SWIGLU,
        grouped_query=GROUPED,
        decoder_only=ALONE,
    ),
}
