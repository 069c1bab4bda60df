"""T5Gemma: two stacks of Gemma 2, each with a config of its own, and cross-attention (Zhang et al. 2025)."""

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.family import Family, Json
from transformer_jax.huggingface.gemma import GEMMAS
from transformer_jax.huggingface.llama import gated
from transformer_jax.huggingface.rows import Row, attention, norm

SIDE = GEMMAS["gemma2"]
ALONE = ("num_layers", "windows")  # fields of a side that the other may have otherwise


def _windows(windows: tuple[int, ...], by: int) -> tuple[int, ...]:
    """Their encoder's window has its farthest key in it, on both sides; ours has not."""
    return tuple(window + by if window else 0 for window in windows)


def _read(config: Json, fields: Json) -> Json:
    sides = {}
    for name in ("encoder", "decoder"):
        found = dict(config.pop(name))
        for said in ("is_decoder", "cross_attention_hidden_size"):  # by which side it is
            found.pop(said, None)
        if (kind := found.get("model_type", "t5_gemma_module")) != "t5_gemma_module":
            raise InputError(f"{name}.model_type={shown(kind)} is not known, only 't5_gemma_module'.")
        try:
            sides[name] = SIDE.understood(found)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    encoder, decoder = sides["encoder"], sides["decoder"]
    if other := [field for field in decoder if field not in ALONE and encoder[field] != decoder[field]]:
        raise InputError(
            f"encoder and decoder are alike here but for their layers; {other[0]} is {shown(encoder[other[0]])} and "
            f"{shown(decoder[other[0]])}."
        )
    config.pop("vocab_size", None)  # the sides' say what is
    tied = decoder["tie_embeddings"]
    if (value := config.pop("tie_word_embeddings", tied)) != tied:
        raise InputError(f"tie_word_embeddings={shown(value)} must be that of the decoder, {shown(tied)}.")
    own = dict(num_encoder_layers=encoder["num_layers"], encoder_windows=_windows(encoder["windows"], 1))
    return decoder | own | dict(mode="encoder-decoder", share_source_embedding=False)


def _write(config: ModelConfig) -> Json:
    encoder = config.of_stack("encoder")
    encoder = encoder.replace(windows=_windows(encoder.windows, -1))
    found: Json = {"tie_word_embeddings": config.tie_embeddings, "vocab_size": config.vocab_size}
    for name, side in (("encoder", encoder), ("decoder", config)):
        found[name] = SIDE.written(side) | {"model_type": "t5_gemma_module", "is_decoder": name == "decoder"}
    found["decoder"]["cross_attention_hidden_size"] = config.d_model
    return found


def _stack(stack: str) -> list[Row]:
    ours, theirs = f"{stack}/block_{{i}}", f"model.{stack}.layers.{{i}}"
    cross = [("cross_attn", "cross_attention")] if stack == "decoder" else []
    sublayers = {"self_attn": "self_attention", "feedforward": "feed_forward"} | dict(cross)
    rows = [*norm(f"model.{stack}.norm", f"{stack}/final_norm"), *gated(theirs, ours)]
    for name, part in (("self_attn", "self_attention"), *cross):
        rows += attention(f"{theirs}.{name}", f"{ours}/{part}")
    for name, part in sublayers.items():
        rows += norm(f"{theirs}.pre_{name}_layernorm", f"{ours}/{part}_residual/before")
        rows += norm(f"{theirs}.post_{name}_layernorm", f"{ours}/{part}_residual/inside")
    return rows


T5GEMMA = Family(
    architecture="T5GemmaForConditionalGeneration",
    keys=(),
    fields={},
    rows=(
        Row("model.encoder.embed_tokens.weight", ("V D",), ("source_embedding/table_VD",)),
        Row("model.decoder.embed_tokens.weight", ("V D",), ("embedding/table_VD",)),
        Row("lm_head.out_proj.weight", ("V D",), ("output/w_DV",)),
        *(row for stack in ("encoder", "decoder") for row in _stack(stack)),
    ),
    read=_read,
    write=_write,
    copies={"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
)
