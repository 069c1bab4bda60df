"""GPT-2, GPT-NeoX and OPT."""

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import ACTIVATIONS, Family, Json, Key
from transformer_jax.huggingface.rows import Row, attention, fused, linear, norm
from transformer_jax.huggingface.settings import BLOCK, DECODER, SIZES, read_rope, write_rope


def _gpt2_rows() -> tuple[Row, ...]:
    h = "transformer.h.{i}"
    return (
        Row("transformer.wte.weight", ("V D",), ("embedding/table_VD",)),
        Row("transformer.wpe.weight", ("L D",), ("decoder/position_LD",)),
        *fused(f"{h}.attn.c_attn", f"{BLOCK}/self_attention", "D (n H K)", "(n H K)"),
        *linear(f"{h}.attn.c_proj", f"{BLOCK}/self_attention/out", "D (H K)", turned=True),
        *linear(f"{h}.mlp.c_fc", f"{BLOCK}/feed_forward/up", "F D", turned=True),
        *linear(f"{h}.mlp.c_proj", f"{BLOCK}/feed_forward/down", "D F", turned=True),
        *norm(f"{h}.ln_1", f"{BLOCK}/self_attention_residual/before"),
        *norm(f"{h}.ln_2", f"{BLOCK}/feed_forward_residual/before"),
        *norm("transformer.ln_f", "decoder/final_norm"),
        Row("lm_head.weight", ("V D",), ("output/w_DV",)),
    )


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_length"),
        Key("n_embd", "d_model"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_inner", "d_ff", None),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fields=DECODER | dict(position="learned"),
    rows=_gpt2_rows(),
    only={
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    prefix="transformer.",
    buffers=(r".*\.attn\.(masked_)?bias",),
    copies={"lm_head.weight": "transformer.wte.weight"},
)


def _neox_rows() -> tuple[Row, ...]:
    layer = "gpt_neox.layers.{i}"
    return (
        Row("gpt_neox.embed_in.weight", ("V D",), ("embedding/table_VD",)),
        Row("embed_out.weight", ("V D",), ("output/w_DV",)),
        *fused(f"{layer}.attention.query_key_value", f"{BLOCK}/self_attention", "(H n K) D", "(H n K)"),
        *linear(f"{layer}.attention.dense", f"{BLOCK}/self_attention/out", "D (H K)"),
        *linear(f"{layer}.mlp.dense_h_to_4h", f"{BLOCK}/feed_forward/up", "F D"),
        *linear(f"{layer}.mlp.dense_4h_to_h", f"{BLOCK}/feed_forward/down", "D F"),
        *norm(f"{layer}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
        *norm(f"{layer}.post_attention_layernorm", f"{BLOCK}/feed_forward_residual/before"),
        *norm("gpt_neox.final_layer_norm", "decoder/final_norm"),
    )


def _neox(config: Json, fields: Json) -> Json:
    """`rotary_pct` and `rotary_emb_base` are the older names."""
    fraction, base = config.pop("rotary_pct", 0.25), config.pop("rotary_emb_base", 10_000.0)
    return read_rope(config, fields, base=base, fraction=fraction)


def _write_neox(config: ModelConfig) -> Json:
    return {"rope_parameters": write_rope(config)["rope_parameters"] | {"partial_rotary_factor": config.rope.fraction}}


NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    keys=(
        *SIZES,
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", False),
        Key("use_parallel_residual", "parallel_residual", True),
    ),
    fields=DECODER | dict(position="rope"),
    rows=_neox_rows(),
    only={"attention_bias": True},
    read=_neox,
    write=_write_neox,
    prefix="gpt_neox.",
    buffers=(r".*rotary_emb\.inv_freq", r".*\.attention\.(masked_)?bias"),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
)


# --- OPT


def _opt_rows() -> tuple[Row, ...]:
    layer = "model.decoder.layers.{i}"
    return (
        Row("model.decoder.embed_tokens.weight", ("V D",), ("embedding/table_VD",)),
        Row("model.decoder.embed_positions.weight", ("L D",), ("decoder/position_LD",)),
        *attention(f"{layer}.self_attn", f"{BLOCK}/self_attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        *norm(f"{layer}.self_attn_layer_norm", f"{BLOCK}/self_attention_residual/before"),
        *linear(f"{layer}.fc1", f"{BLOCK}/feed_forward/up", "F D"),
        *linear(f"{layer}.fc2", f"{BLOCK}/feed_forward/down", "D F"),
        *norm(f"{layer}.final_layer_norm", f"{BLOCK}/feed_forward_residual/before"),
        *norm("model.decoder.final_layer_norm", "decoder/final_norm"),
        Row("lm_head.weight", ("V D",), ("output/w_DV",)),
    )


def _opt(config: Json, fields: Json) -> Json:
    width = config.pop("word_embed_proj_dim", fields["d_model"])
    if width != fields["d_model"]:
        raise InputError(f"word_embed_proj_dim={shown(width)} must be hidden_size={fields['d_model']}.")
    return {}


OPT = Family(
    architecture="OPTForCausalLM",
    keys=(
        *(key for key in SIZES if key.ours != "d_ff"),
        Key("ffn_dim", "d_ff"),
        Key("activation_function", "activation", "relu", ACTIVATIONS),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fields=DECODER | dict(position="learned", position_offset=2, norm_eps=1e-5),
    rows=_opt_rows(),
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    older={"enable_bias": True, "layer_norm_elementwise_affine": True},
    read=_opt,
    write=lambda config: {"word_embed_proj_dim": config.d_model},
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)


GPT = {"gpt2": GPT2, "gpt_neox": NEOX, "opt": OPT}
