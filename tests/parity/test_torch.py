"""Parity with PyTorch's own Transformer: its weights in our model give its outputs, in float32 to 1e-5.

`torch.nn.Transformer` ends both stacks with a norm in post-norm too, where Vaswani et al. 2017 and we have none: its
stacks are built with `norm=None` there. Its order comes from outside, so ours is `position="none"`. What is compared is
logits, from a table of more rows than the model is wide, so that equal logits mean equal outputs.
"""

import jax
import numpy as np
import pytest

from transformer_jax import ModelConfig, Tokens, Transformer

torch = pytest.importorskip("torch", reason="parity with PyTorch needs PyTorch (pip install 'transformer_jax[parity]')")

D, H, F, V, LAYERS, ENCODER_LAYERS = 32, 4, 48, 50, 3, 2
B, T, S = 3, 9, 7
PLACES = {"pre": "before", "post": "after"}
every_kind = pytest.mark.parametrize(
    ("placement", "activation"), [(place, name) for place in PLACES for name in ("relu", "gelu")]
)


def stack(kind: str, placement: str, activation: str, num_layers: int) -> torch.nn.Module:
    """A torch.nn.TransformerEncoder or -Decoder with random parameters, biases and norms too."""
    layer = getattr(torch.nn, f"Transformer{kind}Layer")
    layer = layer(D, H, F, 0.0, activation, layer_norm_eps=1e-6, batch_first=True, norm_first=placement == "pre")
    norm = torch.nn.LayerNorm(D, eps=1e-6) if placement == "pre" else None
    options = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    module = getattr(torch.nn, f"Transformer{kind}")(layer, num_layers, norm, **options).eval()
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.2)
    return module


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def norm(module: torch.nn.LayerNorm) -> dict:
    return {"scale_D": array(module.weight), "bias_D": array(module.bias)}


def attention(module: torch.nn.MultiheadAttention) -> dict:
    """Our attention's parameters: theirs, fused and transposed, as heads."""
    K = D // H
    weights, biases = np.split(array(module.in_proj_weight), 3), np.split(array(module.in_proj_bias), 3)
    names = (("query", "H"), ("key", "G"), ("value", "G"))
    ours = {
        name: {f"w_D{letter}K": w.T.reshape(D, H, K), f"b_{letter}K": b.reshape(H, K)}
        for (name, letter), w, b in zip(names, weights, biases, strict=True)
    }
    out = module.out_proj
    return ours | {"out": {"w_HKD": array(out.weight).T.reshape(H, K, D), "b_D": array(out.bias)}}


def block(layer: torch.nn.Module, place: str) -> dict:
    """Our block's parameters from a layer of an encoder, or from one of a decoder with cross-attention."""
    cross = hasattr(layer, "multihead_attn")
    ours = {
        "self_attention": attention(layer.self_attn),
        "self_attention_residual": {place: norm(layer.norm1)},
        "feed_forward": {
            "up": {"w_DF": array(layer.linear1.weight).T, "b_F": array(layer.linear1.bias)},
            "down": {"w_FD": array(layer.linear2.weight).T, "b_D": array(layer.linear2.bias)},
        },
        "feed_forward_residual": {place: norm(layer.norm3 if cross else layer.norm2)},
    }
    if cross:
        ours |= {
            "cross_attention": attention(layer.multihead_attn),
            "cross_attention_residual": {place: norm(layer.norm2)},
        }
    return ours


def parameters(module: torch.nn.Module, placement: str) -> dict:
    """Our stack's parameters from theirs."""
    ours = {f"block_{i}": block(layer, PLACES[placement]) for i, layer in enumerate(module.layers)}
    return ours | ({} if module.norm is None else {"final_norm": norm(module.norm)})


def our_logits(config: ModelConfig, params: dict, target: Tokens, source: Tokens | None = None) -> np.ndarray:
    """Logits of our model, whose parameters are exactly the given ones."""
    model = Transformer(config)
    wanted = jax.eval_shape(model.init, jax.random.key(0), target, source)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    return np.asarray(jax.jit(model.apply)({"params": params}, target, source))


def config_of(mode: str, placement: str, activation: str, **fields) -> ModelConfig:
    shape = dict(vocab_size=V, d_model=D, num_heads=H, d_ff=F, num_layers=LAYERS, num_encoder_layers=ENCODER_LAYERS)
    kind = dict(norm_placement=placement, activation=activation, position="none", scale_embeddings=False)
    return ModelConfig(mode=mode, **shape | kind | fields)


def embedding() -> torch.nn.Embedding:
    """A table whose logits are of unit variance."""
    return torch.nn.Embedding(V, D, _weight=torch.randn(V, D) / D**0.5)


def random_ids(length: int, lengths: list[int], left: bool = False) -> tuple[np.ndarray, torch.Tensor]:
    """Ids with padding, 0, on one side, and where it is."""
    ids = torch.randint(1, V, (B, length))
    place = torch.arange(length) if not left else length - 1 - torch.arange(length)
    padding = place >= torch.tensor(lengths)[:, None]
    return ids.masked_fill(padding, 0).numpy(), padding


def additive(padding: torch.Tensor) -> torch.Tensor:
    """A padding mask of the same kind as the causal mask, which torch asks for."""
    return torch.zeros(padding.shape).masked_fill(padding, float("-inf"))


@every_kind
@pytest.mark.parametrize("share", [True, False])
def test_the_encoder_decoder_is_torchs(placement, activation, share):
    """torch.nn.Transformer with causal and padding masks, at all positions that are not padding."""
    torch.manual_seed(0)
    encoder = stack("Encoder", placement, activation, ENCODER_LAYERS)
    decoder = stack("Decoder", placement, activation, LAYERS)
    theirs = torch.nn.Transformer(D, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True).eval()
    table, source_table = embedding(), embedding()
    target, target_padding = random_ids(T, [9, 6, 2])
    source, source_padding = random_ids(S, [4, 7, 1], left=True)
    with torch.no_grad():
        hidden = theirs(
            (table if share else source_table)(torch.tensor(source)),
            table(torch.tensor(target)),
            tgt_mask=theirs.generate_square_subsequent_mask(T),
            src_key_padding_mask=additive(source_padding),
            tgt_key_padding_mask=additive(target_padding),
            memory_key_padding_mask=additive(source_padding),
        )
        wanted = (hidden @ table.weight.T).numpy()
    params = {
        "embedding": {"table_VD": array(table.weight)},
        "encoder": parameters(encoder, placement),
        "decoder": parameters(decoder, placement),
    }
    if not share:
        params["source_embedding"] = {"table_VD": array(source_table.weight)}
    config = config_of("encoder-decoder", placement, activation, share_source_embedding=share)
    got = our_logits(config, params, Tokens.from_ids(target, pad_id=0), Tokens.from_ids(source, pad_id=0))
    real = ~target_padding.numpy()
    np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-5)


@every_kind
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_only_model_is_torchs(placement, activation, tied):
    """torch.nn.TransformerEncoder under a causal mask, with a table or a linear layer at its end."""
    torch.manual_seed(1)
    theirs, table, output = (
        stack("Encoder", placement, activation, LAYERS),
        embedding(),
        torch.nn.Linear(D, V, bias=False),
    )
    ids, padding = random_ids(T, [9, 6, 2])
    mask = torch.nn.Transformer.generate_square_subsequent_mask(T)
    with torch.no_grad():
        hidden = theirs(table(torch.tensor(ids)), mask=mask, src_key_padding_mask=additive(padding))
        weight = table.weight if tied else output.weight
        wanted = (hidden @ weight.T).numpy()
    params = {"embedding": {"table_VD": array(table.weight)}, "decoder": parameters(theirs, placement)}
    if not tied:
        params["output"] = {"w_DV": array(output.weight).T}
    config = config_of("decoder-only", placement, activation, tie_embeddings=tied)
    got = our_logits(config, params, Tokens.from_ids(ids, pad_id=0))
    real = ~padding.numpy()
    np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-5)
