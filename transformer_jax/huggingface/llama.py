"""Llama and its kin: Mistral, Qwen, Phi-3 and the mixtures of experts."""

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.huggingface.family import ACTIVATIONS, Family, Json, Key
from transformer_jax.huggingface.rows import Row, attention, linear, norm
from transformer_jax.huggingface.settings import (
    BLOCK,
    DECODER,
    SIZES,
    read_rope,
    read_windows,
    write_rope,
    write_windows,
)

LAYER = "model.layers.{i}"
PLAIN = DECODER | dict(norm="rmsnorm", use_bias=False, gated=True, position="rope")


def gated(theirs: str = LAYER, ours: str = BLOCK) -> list[Row]:
    """A feed-forward layer with a gate."""
    parts = {"gate_proj": ("gate", "F D"), "up_proj": ("up", "F D"), "down_proj": ("down", "D F")}
    return [
        row
        for name, (part, layout) in parts.items()
        for row in linear(f"{theirs}.mlp.{name}", f"{ours}/feed_forward/{part}", layout)
    ]


ENDS = (
    Row("model.embed_tokens.weight", ("V D",), ("embedding/table_VD",)),
    *norm("model.norm", "decoder/final_norm"),
    Row("lm_head.weight", ("V D",), ("output/w_DV",)),
)
TWO_NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{BLOCK}/feed_forward_residual/before"),
)
HEADS = (
    *attention(f"{LAYER}.self_attn", f"{BLOCK}/self_attention"),
    *norm(f"{LAYER}.self_attn.q_norm", f"{BLOCK}/self_attention/query_norm", "K"),
    *norm(f"{LAYER}.self_attn.k_norm", f"{BLOCK}/self_attention/key_norm", "K"),
)
LLAMA_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *gated())


def keys(*, kv_heads: Any = ..., head_dim: Any = None, eps: float = 1e-6, tied: bool = False) -> tuple[Key, ...]:
    """Of Llama's config, with what the configuration class of a family takes where a key is missing; ... is refused."""
    return (
        *SIZES,
        Key("num_key_value_heads", "num_kv_heads", kv_heads),
        Key("head_dim", "head_dim", head_dim),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("tie_word_embeddings", "tie_embeddings", tied),
    )


SILU = Key("hidden_act", "activation", "silu", ACTIVATIONS)
LLAMA_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
INVERSE = (r".*rotary_emb\.inv_freq",)


def _windowed(config: Json, fields: Json) -> Json:
    return read_rope(config, fields) | {"windows": read_windows(config, fields)}


def _write_windowed(config: ModelConfig) -> Json:
    return write_rope(config) | write_windows(config) | {"use_sliding_window": any(config.windows)}


def _one_window(config: Json, default: int) -> Json:
    """The same on all layers."""
    return {"windows": (config.pop("sliding_window", default) or 0,)}


def _mistral(config: Json, fields: Json) -> Json:
    return read_rope(config, fields) | _one_window(config, 4096)


def _mixtral(config: Json, fields: Json) -> Json:
    return read_rope(config, fields, base=1_000_000.0) | _one_window(config, 0)


def _write_mistral(config: ModelConfig) -> Json:
    return write_rope(config) | {"sliding_window": config.windows[0] or None}


def llama(**changes: Any) -> Family:
    base: Json = dict(
        architecture="LlamaForCausalLM",
        keys=(*keys(kv_heads=None), SILU),
        fields=PLAIN,
        rows=LLAMA_ROWS,
        only={"attention_bias": False, "mlp_bias": False},
        older={"rope_interleaved": False},
        read=read_rope,
        write=write_rope,
        prefix="model.",
        buffers=INVERSE,
        copies=LLAMA_COPIES,
    )
    return Family(**base | changes)


# --- Phi-3: Llama with products that are one


def _phi3_rows() -> tuple[Row, ...]:
    heads = tuple(f"{BLOCK}/self_attention/{part}" for part in ("query/w_DHK", "key/w_DGK", "value/w_DGK"))
    gates = tuple(f"{BLOCK}/feed_forward/{part}/w_DF" for part in ("gate", "up"))
    return (
        *ENDS,
        *TWO_NORMS,
        Row(f"{LAYER}.self_attn.qkv_proj.weight", ("(H K) D", "(G K) D", "(G K) D"), heads),
        *linear(f"{LAYER}.self_attn.o_proj", f"{BLOCK}/self_attention/out", "D (H K)"),
        Row(f"{LAYER}.mlp.gate_up_proj.weight", ("(n F) D",), gates),
        *linear(f"{LAYER}.mlp.down_proj", f"{BLOCK}/feed_forward/down", "D F"),
    )


def _phi3(config: Json, fields: Json) -> Json:
    config.pop("original_max_position_embeddings", None)  # for LongRoPE, which is refused by its own name
    return read_rope(config, fields, fraction=1.0) | _one_window(config, 0)


# --- mixtures of experts


def _experts(where: str, names: tuple[str, str, str]) -> tuple[Row, ...]:
    gate, up, down = (f"{where}.experts.{{e}}.{name}.weight" for name in names)
    return (
        Row(f"{where}.gate.weight", ("E D",), (f"{BLOCK}/feed_forward/router/w_DE",)),
        Row(gate, ("F D",), (f"{BLOCK}/feed_forward/gate/w_EDF",)),
        Row(up, ("F D",), (f"{BLOCK}/feed_forward/up/w_EDF",)),
        Row(down, ("D F",), (f"{BLOCK}/feed_forward/down/w_EFD",)),
    )


MIXTRAL_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *_experts(f"{LAYER}.block_sparse_moe", ("w1", "w3", "w2")))
QWEN3_MOE_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *_experts(f"{LAYER}.mlp", ("gate_proj", "up_proj", "down_proj")))


def _qwen3_moe(config: Json, fields: Json) -> Json:
    """All layers are mixtures, so the width of plain ones, which none has, says nothing."""
    config.pop("intermediate_size", None)
    return _windowed(config, fields)


def _write_qwen3_moe(config: ModelConfig) -> Json:
    return _write_windowed(config) | {"intermediate_size": config.d_ff}


LLAMAS = {
    "llama": llama(),
    "mistral": llama(
        architecture="MistralForCausalLM", keys=(*keys(), SILU), only={}, read=_mistral, write=_write_mistral
    ),
    "qwen2": llama(
        architecture="Qwen2ForCausalLM",
        keys=(*keys(), SILU),
        fields=PLAIN | dict(qkv_bias=True),
        only={},
        older={"use_mrope": False},
        read=_windowed,
        write=_write_windowed,
    ),
    "qwen3": llama(
        architecture="Qwen3ForCausalLM",
        keys=(*keys(head_dim=...), SILU),
        fields=PLAIN | dict(qk_norm=True),
        only={"attention_bias": False},
        read=_windowed,
        write=_write_windowed,
    ),
    "phi3": llama(
        architecture="Phi3ForCausalLM",
        keys=(*keys(kv_heads=None, eps=1e-5), SILU),
        rows=_phi3_rows(),
        only={"attention_bias": False},
        read=_phi3,
        write=_write_mistral,
    ),
    "mixtral": llama(
        architecture="MixtralForCausalLM",
        keys=(
            *keys(eps=1e-5),
            SILU,
            Key("num_local_experts", "num_experts"),
            Key("num_experts_per_tok", "experts_per_token"),
        ),
        rows=MIXTRAL_ROWS,
        only={},
        read=_mixtral,
        write=_write_mistral,
    ),
    "qwen3_moe": llama(
        architecture="Qwen3MoeForCausalLM",
        fields=PLAIN | dict(qk_norm=True),
        keys=(
            *(key for key in keys(head_dim=...) if key.ours != "d_ff"),
            SILU,
            Key("moe_intermediate_size", "d_ff"),
            Key("num_local_experts", "num_experts", older="num_experts"),
            Key("num_experts_per_tok", "experts_per_token"),
            Key("norm_topk_prob", "normalize_gates", False),
        ),
        rows=QWEN3_MOE_ROWS,
        only={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        read=_qwen3_moe,
        write=_write_qwen3_moe,
    ),
}
