"""Other libraries, where they are installed: the same architecture at the same sizes, with random weights."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.tokens import Batch

Peer = Callable[[], Any]
PADDING = 0
NAME = "transformers"


def _placed(model: Any, config: ModelConfig) -> Any:
    """A model that decodes, in the config's dtype, on the GPU where PyTorch has one."""
    import torch  # pyright: ignore[reportMissingImports]

    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config.dtype))


def _tensors(ids: np.ndarray, model: Any) -> dict[str, Any]:
    import transformers  # pyright: ignore[reportMissingImports]

    inputs = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return dict(transformers.BatchEncoding(inputs, tensor_type="pt").to(model.device))


def _checked(generate: Callable[[], Any], new: int, prompt: int) -> Peer:
    def run() -> Any:
        out = generate()
        assert out.shape[1] >= prompt + new, out.shape
        return np.asarray(out.cpu())

    return run


def gpt2(config: ModelConfig, prompt: np.ndarray, new: int) -> Peer | None:
    """Greedy decoding by GPT-2 (Radford et al. 2019) in `transformers`, None where it is not installed."""
    try:
        model = _placed(_gpt2_model(config, config.max_length), config)
    except ImportError:
        return None
    length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    inputs = _tensors(prompt, model)
    return _checked(lambda: model.generate(**inputs, **length), new, prompt.shape[1])


def bart(config: ModelConfig, source: np.ndarray, new: int, beam_size: int) -> Peer | None:
    """Beam search, or greedy with 1, by BART (Lewis et al. 2020) in `transformers`, None where it is not installed."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    settings = transformers.BartConfig(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        encoder_layers=config.num_encoder_layers,
        decoder_layers=config.num_layers,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=config.d_ff,
        decoder_ffn_dim=config.d_ff,
        max_position_embeddings=config.max_length,
        forced_eos_token_id=None,
    )
    model = _placed(transformers.BartForConditionalGeneration(settings), config)
    length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, early_stopping=False, num_beams=beam_size)
    inputs = _tensors(source, model)
    return _checked(lambda: model.generate(**inputs, **length), new, 1)


# --- training in PyTorch


def arrays(batch: Batch) -> list[np.ndarray]:
    """Ids of the source, where there is one, of the target, and of the labels."""
    sides = (batch.target,) if batch.source is None else (batch.source, batch.target)
    return [*(np.asarray(side.ids) for side in sides), np.asarray(batch.labels)]


class _Awaited:
    """A tensor that is there once `jax.block_until_ready` has returned."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def block_until_ready(self) -> Any:
        self.tensor.item()
        return self


def _gpt2_model(config: ModelConfig, length: int) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=length,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.d_ff,
        activation_function="gelu" if config.activation == "gelu" else "gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(settings)


def _llama_model(config: ModelConfig, length: int) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=length,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(settings)


def _t5_model(config: ModelConfig, length: int) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.head_dim,
        d_ff=config.d_ff,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.tie_embeddings,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(settings)


def _torch_model(config: ModelConfig, length: int) -> Any:
    """`torch.nn.Transformer` between two embeddings with learned positions and an output layer."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sides = ("source", "target")
            self.tables = nn.ModuleDict({side: nn.Embedding(config.vocab_size, config.d_model) for side in sides})
            self.places = nn.ModuleDict({side: nn.Embedding(length, config.d_model) for side in sides})
            layers = (config.num_encoder_layers, config.num_layers, config.d_ff)
            options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=config.use_bias)
            with warnings.catch_warnings():  # of its nested tensors, which training does not use
                warnings.simplefilter("ignore", UserWarning)
                self.inner = nn.Transformer(config.d_model, config.num_heads, *layers, **options)
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

        def embed(self, side: str, ids: Any) -> Any:
            return self.tables[side](ids) + self.places[side](torch.arange(ids.shape[1], device=ids.device))

        def forward(self, source: Any, target: Any) -> Any:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
            sides, padding = (self.embed("source", source), self.embed("target", target)), source == PADDING
            seen = dict(src_key_padding_mask=padding, memory_key_padding_mask=padding)
            return self.head(self.inner(*sides, tgt_mask=mask, tgt_is_causal=True, **seen))

    return Model()


class Model(NamedTuple):
    """How a model is made, and what it calls the source, where it has one, and the target."""

    make: Callable[[ModelConfig, int], Any]
    sides: tuple[str, ...]


MODELS = {
    "gpt2": Model(_gpt2_model, ("input_ids",)),
    "llama": Model(_llama_model, ("input_ids",)),
    "t5": Model(_t5_model, ("input_ids", "decoder_input_ids")),
    "torch": Model(_torch_model, ("source", "target")),
}


def training(kind: str, config: ModelConfig, batches: Sequence[Sequence[np.ndarray]]) -> tuple[str, Peer] | None:
    """A name, and a function that makes a step of training with each batch in turn, one a call; None where PyTorch or
    `transformers` is missing.

    torch.compile, fused AdamW, PyTorch's own attention kernels, in bfloat16 by autocast where it runs on a GPU.

    Args:
        kind: which of MODELS.
        config: what it is to be like.
        batches: ids of the source, where there is one, of the target, and of the labels, int32[B, T] each. Source and
            labels that are PADDING are left out of attention and loss.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]

        model = MODELS[kind].make(config, max(ids.shape[1] for batch in batches for ids in batch))
    except ImportError:
        return None
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.set_float32_matmul_precision("high")
    model = model.to(device).train()
    cross_entropy = torch.nn.functional.cross_entropy

    def loss(batch: dict[str, Any], labels: Any) -> Any:
        out = model(**batch) if kind == "torch" else model(**batch, use_cache=False).logits
        return cross_entropy(out.float().flatten(0, 1), labels.flatten(), ignore_index=PADDING)

    compiled = torch.compile(loss)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tensors = [[torch.tensor(ids, dtype=torch.long, device=device) for ids in batch] for batch in batches]
    turns = itertools.cycle(tensors)

    def step() -> Any:
        *inputs, labels = next(turns)
        batch = dict(zip(MODELS[kind].sides, inputs, strict=True))
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            value = compiled(batch, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _Awaited(value.detach())

    name = "torch.nn.Transformer" if kind == "torch" else NAME
    return f"{name}, torch.compile", step
