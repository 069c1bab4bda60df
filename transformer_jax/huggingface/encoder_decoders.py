"""The families of encoder-decoders."""

import dataclasses
import re
from typing import Any

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import ACTIVATIONS, Family, Json, Key
from transformer_jax.huggingface.rows import Row, attention, linear, norm

SHARED = dict(mode="encoder-decoder", scan_layers=False)


def _block(stack: str) -> str:
    return f"{stack}/block_{{i}}"


# --- T5


def _t5_stack(stack: str) -> list[Row]:
    ours, theirs = _block(stack), f"{stack}.block.{{i}}.layer"
    names, last = ("q", "k", "v", "o"), 2 if stack == "decoder" else 1
    rows = [
        *attention(f"{theirs}.0.SelfAttention", f"{ours}/self_attention", names),
        *norm(f"{theirs}.0.layer_norm", f"{ours}/self_attention_residual/before"),
        *norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
        Row(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", ("R H",), (f"{stack}/position_RH",)
        ),
        *norm(f"{theirs}.{last}.layer_norm", f"{ours}/feed_forward_residual/before"),
    ]
    if stack == "decoder":
        rows += attention(f"{theirs}.1.EncDecAttention", f"{ours}/cross_attention", names)
        rows += norm(f"{theirs}.1.layer_norm", f"{ours}/cross_attention_residual/before")
    return rows + [
        row
        for name, part, layout in (
            ("wi_0", "gate", "F D"),
            ("wi_1", "up", "F D"),
            ("wi", "up", "F D"),
            ("wo", "down", "D F"),
        )
        for row in linear(f"{theirs}.{last}.DenseReluDense.{name}", f"{ours}/feed_forward/{part}", layout)
    ]


def _t5_rows(gated: bool) -> tuple[Row, ...]:
    left_out = ".wi." if gated else ".wi_"
    return (
        Row("shared.weight", ("V D",), ("embedding/table_VD",)),
        Row("lm_head.weight", ("V D",), ("output/w_DV",)),
        *(row for stack in ("encoder", "decoder") for row in _t5_stack(stack) if left_out not in row.theirs),
    )


FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}


def _read_t5(config: Json, fields: Json) -> Json:
    kind = config.pop("feed_forward_proj", "relu")
    for derived in ("dense_act_fn", "is_gated_act"):
        config.pop(derived, None)
    if kind not in FEED_FORWARD:
        raise InputError(f"feed_forward_proj={kind!r} must be one of {', '.join(FEED_FORWARD)}.")
    activation, gated = FEED_FORWARD[kind]
    fields.setdefault("num_layers", fields["num_encoder_layers"])
    tied = config.pop("tie_word_embeddings", True)
    scaled = config.pop("scale_decoder_outputs", tied)  # transformers 5 says apart what was one before
    return {"activation": activation, "gated": gated, "tie_embeddings": tied, "scale_logits": scaled}


def _write_t5(config: ModelConfig) -> Json:
    kinds = {pair: name for name, pair in FEED_FORWARD.items()}
    return {
        "feed_forward_proj": kinds.get((config.activation, config.gated), "relu"),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
    }


def _read_mt5(config: Json, fields: Json) -> Json:
    return _read_t5(config, fields) | {"scale_logits": False}  # tied or not


def _write_mt5(config: ModelConfig) -> Json:
    return {key: value for key, value in _write_t5(config).items() if key != "scale_decoder_outputs"}


T5 = Family(
    architecture="T5ForConditionalGeneration",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("d_model", "d_model"),
        Key("d_kv", "head_dim"),
        Key("d_ff", "d_ff"),
        Key("num_layers", "num_encoder_layers"),
        Key("num_decoder_layers", "num_layers", None),
        Key("num_heads", "num_heads"),
        Key("n_positions", "max_length", 512),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_max_distance", 128),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
    ),
    fields=SHARED | dict(position="t5", norm="rmsnorm", use_bias=False, query_scale=1.0, scale_embeddings=False),
    rows=lambda config: _t5_rows(config.gated),
    read=_read_t5,
    write=_write_t5,
    may_untie=True,
    copies=dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    ),
)


# --- BART and its kin


def _bart_stack(stack: str, place: str) -> list[Row]:
    ours, theirs = _block(stack), f"model.{stack}.layers.{{i}}"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    rows = [
        Row(f"model.{stack}.embed_positions.weight", ("L D",), (f"{stack}/position_LD",)),
        *norm(f"model.{stack}.layernorm_embedding", f"{stack}/embedding_norm"),
        *norm(f"model.{stack}.layer_norm", f"{stack}/final_norm"),
        *attention(f"{theirs}.self_attn", f"{ours}/self_attention", names),
        *norm(f"{theirs}.self_attn_layer_norm", f"{ours}/self_attention_residual/{place}"),
        *linear(f"{theirs}.fc1", f"{ours}/feed_forward/up", "F D"),
        *linear(f"{theirs}.fc2", f"{ours}/feed_forward/down", "D F"),
        *norm(f"{theirs}.final_layer_norm", f"{ours}/feed_forward_residual/{place}"),
    ]
    if stack == "decoder":
        rows += attention(f"{theirs}.encoder_attn", f"{ours}/cross_attention", names)
        rows += norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}/cross_attention_residual/{place}")
    return rows


def _bart_rows(place: str) -> tuple[Row, ...]:
    return (
        Row("model.shared.weight", ("V D",), ("embedding/table_VD",)),
        Row("final_logits_bias", ("1 V",), ("output_bias_V",)),
        *(row for stack in ("encoder", "decoder") for row in _bart_stack(stack, place)),
    )


def _read_bart(config: Json, fields: Json) -> Json:
    """Both stacks are alike but for their depth; what is said of each must agree."""
    for said in ("num_hidden_layers", "extra_pos_embeddings"):  # by encoder_layers, and by the table of positions
        config.pop(said, None)
    for ours, name in (("num_heads", "attention_heads"), ("d_ff", "ffn_dim")):
        encoder, decoder = (config.pop(f"{side}_{name}") for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise InputError(f"encoder_{name}={encoder} and decoder_{name}={decoder} must be the same.")
        fields[ours] = decoder
    if config.pop("decoder_vocab_size", None) not in (None, fields["vocab_size"]):
        raise InputError(f"decoder_vocab_size must be vocab_size={fields['vocab_size']}.")
    return {}


def _sinusoids(config: ModelConfig) -> dict[str, np.ndarray]:
    """The table of sines and cosines of each stack, to the bit as `transformers` makes it."""
    angles = np.arange(config.max_length)[:, None] / np.power(10_000, np.arange(0, config.d_model, 2) / config.d_model)
    table = np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
    return {f"model.{stack}.embed_positions.weight": table for stack in ("encoder", "decoder")}


def _write_bart(config: ModelConfig) -> Json:
    sides = {"attention_heads": config.num_heads, "ffn_dim": config.d_ff}
    return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}


BART_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("d_model", "d_model"),
    Key("encoder_layers", "num_encoder_layers"),
    Key("decoder_layers", "num_layers"),
    Key("max_position_embeddings", "max_length"),
    Key("activation_function", "activation", ..., ACTIVATIONS),
    Key("scale_embedding", "scale_embeddings"),
)
EMBEDDINGS = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


def _bart(architecture: str, tables_saved: bool = False, **changes: Any) -> Family:
    """A kin of BART by the fields of ours in which it differs from mBART's layout."""
    fields = SHARED | dict(norm_placement="pre", norm_eps=1e-5, tie_embeddings=True) | changes
    pre, static = fields["norm_placement"] == "pre", fields["position"] != "learned"
    older = {"normalize_before": pre, "add_final_layer_norm": pre, "static_position_embeddings": static}
    older |= {"normalize_embedding": bool(fields.get("embedding_norm")), "add_bias_logits": False}
    return Family(
        architecture=architecture,
        base=re.sub("(MTModel|ForConditionalGeneration)$", "Model", architecture),
        prefix="model.",
        zeros=("final_logits_bias",),
        keys=BART_KEYS,
        fields=fields,
        rows=_bart_rows("before" if pre else "after"),
        only={"tie_word_embeddings": True},
        older=older | {"share_encoder_decoder_embeddings": True},
        read=_read_bart,
        write=_write_bart,
        tables=_sinusoids if fields["position"] == "sinusoidal" else None,
        tables_saved=tables_saved,
        buffers=(r"model\.(encoder|decoder)\.embed_positions\.weights",),
        copies=dict.fromkeys(EMBEDDINGS, "model.shared.weight"),
    )


ENCODER_DECODERS = {
    "t5": T5,
    "mt5": dataclasses.replace(T5, architecture="MT5ForConditionalGeneration", read=_read_mt5, write=_write_mt5),
    "bart": _bart(
        "BartForConditionalGeneration",
        position="learned",
        position_offset=2,
        norm_placement="post",
        embedding_norm=True,
        output_bias=True,
    ),
    "mbart": _bart(
        "MBartForConditionalGeneration", position="learned", position_offset=2, embedding_norm=True, output_bias=True
    ),
    "marian": _bart("MarianMTModel", position="sinusoidal", norm_placement="post", output_bias=True),
    "pegasus": _bart("PegasusForConditionalGeneration", tables_saved=True, position="sinusoidal", output_bias=True),
    "m2m_100": _bart("M2M100ForConditionalGeneration", position="sinusoidal_t2t", position_offset=2),
}
