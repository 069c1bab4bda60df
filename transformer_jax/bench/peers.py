"""Other libraries, where they are installed: the same architecture at the same sizes, with random weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from transformer_jax.config import ModelConfig

Peer = Callable[[], Any]
NAME = "transformers"


def _tensors(ids: np.ndarray) -> dict[str, Any]:
    import transformers  # pyright: ignore[reportMissingImports]

    return dict(
        transformers.BatchEncoding(
            {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}, tensor_type="pt"
        )
    )


def _checked(generate: Callable[[], Any], new: int, prompt: int) -> Peer:
    def run() -> Any:
        out = generate()
        assert out.shape[1] >= prompt + new, out.shape
        return np.asarray(out)

    return run


def gpt2(config: ModelConfig, prompt: np.ndarray, new: int) -> Peer | None:
    """Greedy decoding by GPT-2 (Radford et al. 2019) in `transformers`, None where it is not installed."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_length,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
    )
    model = transformers.GPT2LMHeadModel(settings).eval()
    length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    inputs = _tensors(prompt)
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
    model = transformers.BartForConditionalGeneration(settings).eval()
    length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, early_stopping=False, num_beams=beam_size)
    inputs = _tensors(source)
    return _checked(lambda: model.generate(**inputs, **length), new, 1)
