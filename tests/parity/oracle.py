"""What `transformers` computes with tiny random models of every family: what tests compare this package with.

    python tests/parity/oracle.py       writes tests/fixtures, with which they do so where there is no PyTorch

It needs PyTorch and transformers; the fixtures were made by transformers 5.24.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from transformer_jax.safetensors_file import write_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
LENGTH, SOURCE, ROWS, VOCAB, NEW = 23, 17, 3, 61, 12
GROUPED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
WIDE = GROUPED | dict(head_dim=10)  # not hidden_size / num_attention_heads
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
BART = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=20,
    decoder_ffn_dim=20,
    max_position_embeddings=64,
)
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=10, d_ff=20, num_layers=1, num_decoder_layers=2, num_heads=4)
GEMMA2 = dict(query_pre_attn_scalar=12, sliding_window=7)
EXPERTS = dict(num_experts_per_tok=2)


def theta(**rope):
    return dict(rope_parameters=dict(rope_theta=500.0) | rope)


CASES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=20)),
    "gpt2-untied": (
        "GPT2",
        dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False),
    ),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}
        | dict(use_parallel_residual=False, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    ),
    "opt": (
        "OPT",
        dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4)
        | dict(word_embed_proj_dim=32, max_position_embeddings=64),
    ),
    "llama": ("Llama", WIDE),
    "llama-tied-llama3": ("Llama", GROUPED | dict(tie_word_embeddings=True) | theta(**LLAMA3)),
    "llama-linear": ("Llama", GROUPED | theta(rope_type="linear", factor=4.0)),
    "llama-yarn": ("Llama", GROUPED | theta(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": ("Mistral", WIDE | dict(sliding_window=7)),
    "qwen2": ("Qwen2", GROUPED | dict(tie_word_embeddings=True)),
    "qwen2-windows": ("Qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", WIDE),
    "gemma": ("Gemma", WIDE),
    "gemma2": ("Gemma2", WIDE | GEMMA2),
    "gemma3_text": (
        "Gemma3Text",
        WIDE | GEMMA2 | dict(num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    ),
    "gemma3_text-deep": ("Gemma3Text", WIDE | GEMMA2 | dict(num_hidden_layers=7)),
    "phi3": ("Phi3", GROUPED | dict(sliding_window=7)),
    "phi3-partial": ("Phi3", GROUPED | theta(rope_type="default", partial_rotary_factor=0.5)),
    "mixtral": ("Mixtral", GROUPED | EXPERTS | dict(num_local_experts=3)),
    "qwen3_moe": (
        "Qwen3Moe",
        WIDE | EXPERTS | dict(num_experts=3, moe_intermediate_size=12, norm_topk_prob=True),
    ),
    "t5": ("T5", T5 | dict(num_layers=2)),  # their cache has as many layers as their encoder
    "t5-uneven": ("T5", T5),
    "t5-v1.1": ("T5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("MT5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART | dict(scale_embedding=True)),
    "marian": ("Marian", BART | dict(pad_token_id=VOCAB - 1, scale_embedding=True, activation_function="swish")),
    "pegasus": ("Pegasus", BART | dict(scale_embedding=True, activation_function="relu")),
    "t5gemma": (
        "T5Gemma",
        dict(encoder=WIDE | GEMMA2 | dict(sliding_window=5, num_hidden_layers=1), decoder=WIDE | GEMMA2),
    ),
    "m2m_100": ("M2M100", BART | dict(scale_embedding=True, activation_function="relu")),
}


def architecture(name):
    name = name.removesuffix("Text")
    special = {"GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel"}
    seq = ("T5", "T5Gemma", "MT5", "Bart", "MBart", "Pegasus", "M2M100")
    return special.get(name, f"{name}{'ForConditionalGeneration' if name in seq else 'ForCausalLM'}")


FAMILIES = [case for case in CASES if "-" not in case]  # have a fixture
DECODED = ("gpt2", "llama", "t5", "bart", "marian")  # whose texts are compared too
PENALTIES = (0.6, 1.0, 1.4)


def build(case):
    """A model, with random norms and biases too."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, architecture(name))(config).eval()
    with torch.no_grad():
        for key, parameter in [*model.named_parameters(), *model.named_buffers()]:
            scale = "norm" in key.lower() or "ln_" in key
            if parameter.dtype.is_floating_point and (parameter.ndim == 1 or "final_logits_bias" in key):
                if "inv_freq" not in key:
                    parameter.add_(0.3 * torch.randn_like(parameter)) if scale else parameter.normal_(0, 0.3)
            elif parameter.dtype.is_floating_point and parameter.ndim > 1 and "embed_positions" not in key:
                parameter.normal_(0, 0.2)
    return model


def padded(seed, length, pad):
    """ids, and which are no padding: rows padded on the left, on the right, and full."""
    ids = np.random.default_rng(seed).integers(3, VOCAB - 1, (ROWS, length))
    mask = np.ones_like(ids)
    mask[0, :5], mask[1, -6:] = 0, 0
    ids[mask == 0] = pad
    return ids, mask


def full(seed, ids, mask, row):
    """The same with a row that has no padding."""
    mask[row], ids[row] = 1, np.random.default_rng(seed).integers(3, VOCAB - 1, ids.shape[1])
    return ids, mask


def is_one_of(model, *kinds):
    return any(kind in type(model).__name__ for kind in kinds)


def inputs_of(model):
    """A batch: ids and mask, and of an encoder-decoder source_ids and source_mask, padded where the family can."""
    pad, found = model.config.pad_token_id or 0, {}
    ids, mask = padded(0, LENGTH, pad)
    if model.config.is_encoder_decoder:
        ids, mask = full(9, ids, mask, 0)  # their decoders count places from the first column
        source = padded(1, SOURCE, pad)
        found["source_ids"], found["source_mask"] = source if is_one_of(model, "T5", "M2M") else full(8, *source, 0)
    return found | {"ids": ids, "mask": mask}


def prompts_of(model):
    """A batch to go on from, in the same form."""
    if model.config.is_encoder_decoder:
        first = {"ids": np.full((ROWS, 1), 5), "mask": np.ones((ROWS, 1), int)}
        return first | {name: x for name, x in inputs_of(model).items() if name.startswith("source")}
    ids, mask = full(7, *padded(0, 9, 0), 1)  # they take padding on the left
    return {"ids": ids, "mask": mask}


def logits_of(model, inputs):
    """Theirs, float32[B, T, V]."""
    ids, mask = (torch.tensor(inputs[name]) for name in ("ids", "mask"))
    given = dict(input_ids=ids, attention_mask=mask)
    if "source_ids" in inputs:
        given = dict(decoder_input_ids=ids, decoder_attention_mask=mask)
        given |= dict(input_ids=torch.tensor(inputs["source_ids"]), attention_mask=torch.tensor(inputs["source_mask"]))
    elif not is_one_of(model, "OPT"):
        given["position_ids"] = torch.tensor(np.maximum(np.cumsum(inputs["mask"], -1) - 1, 0))
    with torch.no_grad():
        return model(**given, use_cache=False).logits.float().numpy()


def decoded(model, inputs, end, **options):
    """Their new tokens, int[B, NEW], padded."""
    ids, mask, pad = inputs["ids"], inputs["mask"], model.config.pad_token_id or 0
    given = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    if "source_ids" in inputs:
        given = dict(input_ids=torch.tensor(inputs["source_ids"]), attention_mask=torch.tensor(inputs["source_mask"]))
        given |= dict(decoder_start_token_id=int(ids[0, 0]))
    none = dict(forced_bos_token_id=None, forced_eos_token_id=None, bad_words_ids=None, do_sample=False)
    none |= dict(eos_token_id=end, pad_token_id=pad, max_new_tokens=NEW, early_stopping="never")
    found = model.generate(**given, **(none | options))[:, ids.shape[1] :].numpy()
    found = np.pad(found, [(0, 0), (0, NEW - found.shape[1])], constant_values=pad)
    ended = np.cumsum(found == end, -1) - (found == end) > 0
    return np.where(ended, pad, found)  # by beam search they fill up with the end


def expected(model, texts=False):
    """What tests compare with: inputs and logits, and with `texts` what is said after prompts, greedily and by beam."""
    inputs = inputs_of(model)
    found = inputs | {"logits": logits_of(model, inputs), "pad": np.array(model.config.pad_token_id or 0)}
    if texts:
        prompts = prompts_of(model)
        end = int(decoded(model, prompts, -1)[0, 3])  # a token that is said
        found |= {f"prompt_{name}": x for name, x in prompts.items()} | {"end": np.array(end)}
        found["greedy"] = decoded(model, prompts, end)
        for penalty in PENALTIES:
            found[f"beam_{penalty}"] = decoded(model, prompts, end, num_beams=4, length_penalty=penalty)
    return found


def main():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for case in FAMILIES:
        model, folder = build(case), FIXTURES / case
        model.save_pretrained(folder)
        found = expected(model, case in DECODED)
        arrays = {name: x.astype(np.int32) if x.dtype.kind == "i" else x for name, x in found.items()}
        write_safetensors(folder / "expected.safetensors", arrays)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{case}: {size / 1000:.0f} kB, {json.loads((folder / 'config.json').read_text())['architectures'][0]}")


if __name__ == "__main__":
    main()
