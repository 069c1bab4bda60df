"""Gemma 1, 2 and 3."""

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import ACTIVATIONS, Json, Key
from transformer_jax.huggingface.llama import ENDS, HEADS, LAYER, gated, keys, llama
from transformer_jax.huggingface.rows import norm
from transformer_jax.huggingface.settings import BLOCK, DECODER, read_rope, read_windows, write_rope, write_windows

FOUR_NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{BLOCK}/self_attention_residual/inside"),
    *norm(f"{LAYER}.pre_feedforward_layernorm", f"{BLOCK}/feed_forward_residual/before"),
    *norm(f"{LAYER}.post_feedforward_layernorm", f"{BLOCK}/feed_forward_residual/inside"),
)

GEMMA = DECODER | dict(norm="rmsnorm1p", use_bias=False, gated=True, position="rope", scale_embeddings=True)
GEMMA_KEYS = keys(head_dim=256, tied=True)


def _caps(attention: float | None, logits: float | None) -> tuple[Key, ...]:
    """With what there is where config.json does not say; null is none."""
    names = ("attn_logit_softcapping", "attention_softcap"), ("final_logit_softcapping", "logits_softcap")
    return tuple(Key(*pair, default) for pair, default in zip(names, (attention, logits), strict=True))


def _gemma_activation(config: Json) -> Json:
    """`hidden_activation`; where only the older `hidden_act` is there, the tanh form is meant all the same."""
    old, name = config.pop("hidden_act", None), config.pop("hidden_activation", None)
    name = name or ("gelu_pytorch_tanh" if old in (None, "gelu", "gelu_pytorch_tanh") else old)
    if name not in ACTIVATIONS:
        raise InputError(f"hidden_activation={shown(name)} must be one of {', '.join(ACTIVATIONS)}.")
    return {"activation": ACTIVATIONS[name]}


def _words(config: ModelConfig) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


def _gemma(config: Json, fields: Json) -> Json:
    return _gemma_activation(config) | read_rope(config, fields)


def _write_gemma(config: ModelConfig) -> Json:
    return {"hidden_activation": _words(config), "hidden_act": _words(config)} | write_rope(config)


def _alternating(config: Json, fields: Json, pattern: int) -> Json:
    """Every `pattern`-th layer sees all, the others a window, unless `layer_types` says otherwise."""
    pattern = config.pop("_sliding_window_pattern", None) or config.pop("sliding_window_pattern", None) or pattern
    config.pop("sliding_window_pattern", None)
    config.setdefault("sliding_window", 4096)
    if config.get("layer_types") is None:
        layers = range(1, fields["num_layers"] + 1)
        config["layer_types"] = ["full_attention" if i % pattern == 0 else "sliding_attention" for i in layers]
    scale = config.pop("query_pre_attn_scalar", None) or 256
    return _gemma_activation(config) | {"query_scale": scale**-0.5, "windows": read_windows(config, fields)}


def _gemma2(config: Json, fields: Json) -> Json:
    return _alternating(config, fields, 2) | read_rope(config, fields)


def _gemma3(config: Json, fields: Json) -> Json:
    found, local = _alternating(config, fields, 6), config.pop("rope_local_base_freq", None)
    both = config.get("rope_parameters") or {}
    if "full_attention" in both:
        near = dict(both.get("sliding_attention") or {})
        if near.pop("rope_type", "default") != "default" or set(near) - {"rope_theta"}:
            raise InputError(f"rope_parameters of sliding_attention {shown(near)} are not known.")
        config["rope_parameters"], local = both["full_attention"], near.get("rope_theta")
    elif not both and config.get("rope_theta") is None:
        config["rope_theta"] = 1_000_000.0
    return found | {"rope": read_rope(config, fields)["rope"] | {"local_base": float(local or 10_000.0)}}


def _scalar(config: ModelConfig) -> float:
    exact = (config.query_scale or config.head_dim**-0.5) ** -2
    return round(exact) if abs(exact - round(exact)) < 1e-6 else exact


def _write_gemma2(config: ModelConfig) -> Json:
    return _write_gemma(config) | write_windows(config) | {"query_pre_attn_scalar": _scalar(config)}


def _write_gemma3(config: ModelConfig) -> Json:
    near = {"rope_type": "default", "rope_theta": config.rope.local_base or config.rope.base}
    both = {"full_attention": write_rope(config)["rope_parameters"], "sliding_attention": near}
    return _write_gemma2(config) | {"rope_parameters": both}


GEMMAS = {
    "gemma": llama(
        architecture="GemmaForCausalLM",
        fields=GEMMA,
        keys=GEMMA_KEYS,
        only={"attention_bias": False, "use_bidirectional_attention": None},
        read=_gemma,
        write=_write_gemma,
    ),
    "gemma2": llama(
        architecture="Gemma2ForCausalLM",
        fields=GEMMA | dict(norm_placement="sandwich"),
        keys=(*GEMMA_KEYS, *_caps(50.0, 30.0)),
        rows=(*ENDS, *HEADS, *FOUR_NORMS, *gated()),
        only={"attention_bias": False, "use_bidirectional_attention": None},
        read=_gemma2,
        write=_write_gemma2,
    ),
    "gemma3_text": llama(
        architecture="Gemma3ForCausalLM",
        fields=GEMMA | dict(norm_placement="sandwich", qk_norm=True),
        keys=(*GEMMA_KEYS, *_caps(None, None)),
        rows=(*ENDS, *HEADS, *FOUR_NORMS, *gated()),
        only={"attention_bias": False, "use_bidirectional_attention": False},
        read=_gemma3,
        write=_write_gemma3,
    ),
}
