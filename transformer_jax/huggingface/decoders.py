"""The families of decoder-only models."""

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import ACTIVATIONS, Family, Json, Key
from transformer_jax.huggingface.rows import Row, attention, linear, norm

DECODER = dict(mode="decoder-only", scale_embeddings=False)
PLAIN = DECODER | dict(norm="rmsnorm", use_bias=False, gated=True, position="rope", scan_layers=False)
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


def read_rope(config: Json, fields: Json) -> Json:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before."""
    found = dict(config.pop("rope_parameters", None) or {})
    scaling = config.pop("rope_scaling", None)
    if scaling:
        found |= scaling
    theta, fraction = config.pop("rope_theta", None), config.pop("partial_rotary_factor", None)
    rope = {"base": float(found.pop("rope_theta", theta or 10_000.0))}
    rope["fraction"] = float(found.pop("partial_rotary_factor", fraction or 1.0))
    return {"rope": rope | _read_scaling(found, fields)}


def _read_scaling(found: Json, fields: Json) -> Json:
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    keys = {
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
    if kind not in keys:
        raise InputError(f"config.json: rope_type {shown(kind)} must be one of {', '.join(keys)}.")
    rope: Json = {} if kind == "default" else {"scaling": kind}
    if kind == "yarn":
        rope |= dict(low=1.0, high=32.0, original_length=fields["max_length"])
    for theirs, ours in keys[kind].items():
        if theirs in found:
            value = found.pop(theirs)
            rope[ours] = int(value) if ours == "original_length" else float(value)
    found.pop("original_max_position_embeddings", None) if kind == "default" else None
    if found:
        raise InputError(f"config.json: rope of type {kind}: unknown {', '.join(map(shown, found))}.")
    return rope


def write_rope(config: ModelConfig) -> Json:
    rope, names = config.rope, {"none": "default"}
    found: Json = {"rope_type": names.get(rope.scaling, rope.scaling), "rope_theta": rope.base}
    if rope.fraction != 1:
        found["partial_rotary_factor"] = rope.fraction
    if rope.scaling != "none":
        found["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        low, high = ("low_freq_factor", "high_freq_factor") if rope.scaling == "llama3" else ("beta_slow", "beta_fast")
        found |= {low: rope.low, high: rope.high, "original_max_position_embeddings": rope.original_length}
    return {"rope_parameters": found}


# --- windows


def read_windows(config: Json, fields: Json) -> tuple[int, ...]:
    """`sliding_window` on all layers, or on those that `layer_types` names."""
    window, kinds = config.pop("sliding_window", None) or 0, config.pop("layer_types", None)
    used = config.pop("use_sliding_window", True)
    first = config.pop("max_window_layers", None)
    if kinds is None:
        if used and window and first is not None and first < fields["num_layers"]:
            kinds = ["full_attention"] * first + ["sliding_attention"] * (fields["num_layers"] - first)
        else:
            kinds = ["sliding_attention" if used and window and first is None else "full_attention"]
            kinds *= fields["num_layers"]
    known = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise InputError(f"config.json: layer_types has {shown(kind)}; known are {', '.join(known)}.")
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


# --- decoder-only


def _gated(theirs: str = "model.layers.{i}.mlp") -> list[Row]:
    parts = {"gate_proj": ("gate", "F D"), "up_proj": ("up", "F D"), "down_proj": ("down", "D F")}
    return [
        row
        for name, (part, layout) in parts.items()
        for row in linear(f"{theirs}.{name}", f"{BLOCK}/feed_forward/{part}", layout)
    ]


LAYER = "model.layers.{i}"
ENDS = (
    Row("model.embed_tokens.weight", ("V D",), ("embedding/table_VD",)),
    *norm("model.norm", "decoder/final_norm"),
    Row("lm_head.weight", ("V D",), ("output/w_DV",)),
)
TWO_NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{BLOCK}/feed_forward_residual/before"),
)
FOUR_NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{BLOCK}/self_attention_residual/inside"),
    *norm(f"{LAYER}.pre_feedforward_layernorm", f"{BLOCK}/feed_forward_residual/before"),
    *norm(f"{LAYER}.post_feedforward_layernorm", f"{BLOCK}/feed_forward_residual/inside"),
)
HEADS = (
    *attention(f"{LAYER}.self_attn", f"{BLOCK}/self_attention"),
    *norm(f"{LAYER}.self_attn.q_norm", f"{BLOCK}/self_attention/query_norm", "K"),
    *norm(f"{LAYER}.self_attn.k_norm", f"{BLOCK}/self_attention/key_norm", "K"),
)
LLAMA_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *_gated())
LLAMA_KEYS = (
    *SIZES,
    Key("num_key_value_heads", "num_kv_heads", None),
    Key("head_dim", "head_dim", None),
    Key("hidden_act", "activation", "silu", ACTIVATIONS),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", False),
)
LLAMA_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
INVERSE = (r".*rotary_emb\.inv_freq",)


def _windowed(config: Json, fields: Json) -> Json:
    return read_rope(config, fields) | {"windows": read_windows(config, fields)}


def _write_windowed(config: ModelConfig) -> Json:
    return write_rope(config) | write_windows(config) | {"use_sliding_window": any(config.windows)}


def _mistral(config: Json, fields: Json) -> Json:
    """Its window is on all layers."""
    window = config.pop("sliding_window", None) or 0
    return read_rope(config, fields) | {"windows": (window,)}


def _write_mistral(config: ModelConfig) -> Json:
    return write_rope(config) | {"sliding_window": config.windows[0] or None}


def _llama(**changes: Any) -> Family:
    base: Json = dict(
        architecture="LlamaForCausalLM",
        keys=LLAMA_KEYS,
        fields=PLAIN,
        rows=LLAMA_ROWS,
        only={"attention_bias": False, "mlp_bias": False},
        read=read_rope,
        write=write_rope,
        prefix="model.",
        buffers=INVERSE,
        copies=LLAMA_COPIES,
    )
    return Family(**base | changes)


def _gpt2_rows() -> tuple[Row, ...]:
    h = "transformer.h.{i}"
    heads = tuple(f"{BLOCK}/self_attention/{part}" for part in ("query", "key", "value"))
    return (
        Row("transformer.wte.weight", ("V D",), ("embedding/table_VD",)),
        Row("transformer.wpe.weight", ("L D",), ("decoder/position_LD",)),
        Row(f"{h}.attn.c_attn.weight", ("D (n H K)",), (f"{heads[0]}/w_DHK", f"{heads[1]}/w_DGK", f"{heads[2]}/w_DGK")),
        Row(f"{h}.attn.c_attn.bias", ("(n H K)",), (f"{heads[0]}/b_HK", f"{heads[1]}/b_GK", f"{heads[2]}/b_GK")),
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
    fields=DECODER | dict(position="learned", scan_layers=False),
    rows=_gpt2_rows(),
    only={
        "add_cross_attention": False,
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
    heads = tuple(f"{BLOCK}/self_attention/{part}" for part in ("query", "key", "value"))
    fused = f"{layer}.attention.query_key_value"
    return (
        Row("gpt_neox.embed_in.weight", ("V D",), ("embedding/table_VD",)),
        Row("embed_out.weight", ("V D",), ("output/w_DV",)),
        Row(f"{fused}.weight", ("(H n K) D",), (f"{heads[0]}/w_DHK", f"{heads[1]}/w_DGK", f"{heads[2]}/w_DGK")),
        Row(f"{fused}.bias", ("(H n K)",), (f"{heads[0]}/b_HK", f"{heads[1]}/b_GK", f"{heads[2]}/b_GK")),
        *linear(f"{layer}.attention.dense", f"{BLOCK}/self_attention/out", "D (H K)"),
        *linear(f"{layer}.mlp.dense_h_to_4h", f"{BLOCK}/feed_forward/up", "F D"),
        *linear(f"{layer}.mlp.dense_4h_to_h", f"{BLOCK}/feed_forward/down", "D F"),
        *norm(f"{layer}.input_layernorm", f"{BLOCK}/self_attention_residual/before"),
        *norm(f"{layer}.post_attention_layernorm", f"{BLOCK}/feed_forward_residual/before"),
        *norm("gpt_neox.final_layer_norm", "decoder/final_norm"),
    )


def _neox(config: Json, fields: Json) -> Json:
    fraction, base = config.pop("rotary_pct", None), config.pop("rotary_emb_base", None)
    found = read_rope(config, fields)
    if fraction is not None:
        found["rope"]["fraction"] = float(fraction)
    if base is not None:
        found["rope"]["base"] = float(base)
    return found


NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    keys=(
        *SIZES,
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", False),
        Key("use_parallel_residual", "parallel_residual", True),
    ),
    fields=DECODER | dict(position="rope", scan_layers=False),
    rows=_neox_rows(),
    only={"attention_bias": True},
    read=_neox,
    write=write_rope,
    prefix="gpt_neox.",
    buffers=(*INVERSE, r".*\.attention\.(masked_)?bias"),
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
        raise InputError(f"config.json: word_embed_proj_dim={shown(width)} must be hidden_size={fields['d_model']}.")
    return {}


OPT = Family(
    architecture="OPTForCausalLM",
    keys=(
        *(key for key in SIZES if key.ours != "d_ff"),
        Key("ffn_dim", "d_ff"),
        Key("activation_function", "activation", "relu", ACTIVATIONS),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fields=DECODER | dict(position="learned", position_offset=2, norm_eps=1e-5, scan_layers=False),
    rows=_opt_rows(),
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True},
    read=_opt,
    write=lambda config: {"word_embed_proj_dim": config.d_model},
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)


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
    return _mistral(config, fields)


# --- Gemma

GEMMA = DECODER | dict(
    norm="rmsnorm1p", use_bias=False, gated=True, position="rope", scale_embeddings=True, scan_layers=False
)
GEMMA_KEYS = (
    *(key for key in LLAMA_KEYS if key.ours not in ("activation", "tie_embeddings")),
    Key("tie_word_embeddings", "tie_embeddings", True),
)
GEMMA_2_KEYS = (
    *GEMMA_KEYS,
    Key("attn_logit_softcapping", "attention_softcap", None),
    Key("final_logit_softcapping", "logits_softcap", None),
)


def _gemma_activation(config: Json) -> Json:
    """`hidden_activation`; where only the older `hidden_act` is there, the tanh form is meant all the same."""
    old, name = config.pop("hidden_act", None), config.pop("hidden_activation", None)
    name = name or ("gelu_pytorch_tanh" if old in (None, "gelu", "gelu_pytorch_tanh") else old)
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: hidden_activation={shown(name)} must be one of {', '.join(ACTIVATIONS)}.")
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
            raise InputError(f"config.json: rope_parameters of sliding_attention {shown(near)} are not known.")
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


# --- mixtures of experts


def _experts(where: str, router: str, names: tuple[str, str, str]) -> tuple[Row, ...]:
    gate, up, down = (f"{where}.experts.{{e}}.{name}.weight" for name in names)
    return (
        Row(f"{where}.{router}.weight", ("E D",), (f"{BLOCK}/feed_forward/router/w_DE",)),
        Row(gate, ("F D",), (f"{BLOCK}/feed_forward/gate/w_EDF",)),
        Row(up, ("F D",), (f"{BLOCK}/feed_forward/up/w_EDF",)),
        Row(down, ("D F",), (f"{BLOCK}/feed_forward/down/w_EFD",)),
    )


MIXTRAL_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *_experts(f"{LAYER}.block_sparse_moe", "gate", ("w1", "w3", "w2")))
QWEN3_MOE_ROWS = (*ENDS, *HEADS, *TWO_NORMS, *_experts(f"{LAYER}.mlp", "gate", ("gate_proj", "up_proj", "down_proj")))


def _qwen3_moe(config: Json, fields: Json) -> Json:
    """All layers are mixtures, so the width of plain ones, which none has, says nothing."""
    config.pop("intermediate_size", None)
    return _windowed(config, fields)


def _write_qwen3_moe(config: ModelConfig) -> Json:
    return _write_windowed(config) | {"intermediate_size": config.d_ff}


DECODERS = {
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "opt": OPT,
    "llama": _llama(),
    "mistral": _llama(architecture="MistralForCausalLM", only={}, read=_mistral, write=_write_mistral),
    "qwen2": _llama(
        architecture="Qwen2ForCausalLM",
        fields=PLAIN | dict(qkv_bias=True),
        only={},
        read=_windowed,
        write=_write_windowed,
    ),
    "qwen3": _llama(
        architecture="Qwen3ForCausalLM",
        fields=PLAIN | dict(qk_norm=True),
        only={"attention_bias": False},
        read=_windowed,
        write=_write_windowed,
    ),
    "gemma": _llama(
        architecture="GemmaForCausalLM",
        fields=GEMMA,
        keys=GEMMA_KEYS,
        only={"attention_bias": False, "use_bidirectional_attention": None},
        read=_gemma,
        write=_write_gemma,
    ),
    "gemma2": _llama(
        architecture="Gemma2ForCausalLM",
        fields=GEMMA | dict(norm_placement="sandwich"),
        keys=GEMMA_2_KEYS,
        rows=(*ENDS, *HEADS, *FOUR_NORMS, *_gated()),
        only={"attention_bias": False, "use_bidirectional_attention": None},
        read=_gemma2,
        write=_write_gemma2,
    ),
    "gemma3_text": _llama(
        architecture="Gemma3ForCausalLM",
        fields=GEMMA | dict(norm_placement="sandwich", qk_norm=True),
        keys=GEMMA_2_KEYS,
        rows=(*ENDS, *HEADS, *FOUR_NORMS, *_gated()),
        only={"attention_bias": False, "use_bidirectional_attention": False},
        read=_gemma3,
        write=_write_gemma3,
    ),
    "phi3": _llama(
        architecture="Phi3ForCausalLM",
        rows=_phi3_rows(),
        only={"attention_bias": False},
        read=_phi3,
        write=_write_mistral,
    ),
    "mixtral": _llama(
        architecture="MixtralForCausalLM",
        keys=(*LLAMA_KEYS, Key("num_local_experts", "num_experts"), Key("num_experts_per_tok", "experts_per_token", 2)),
        rows=MIXTRAL_ROWS,
        only={},
        read=_mistral,
        write=_write_mistral,
    ),
    "qwen3_moe": _llama(
        architecture="Qwen3MoeForCausalLM",
        fields=PLAIN | dict(qk_norm=True),
        keys=(
            *(key for key in LLAMA_KEYS if key.ours != "d_ff"),
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
