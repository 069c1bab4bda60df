"""Parity with `transformers`: models that it makes and saves give its logits here, and go back as they came."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transformer_jax import Tokens, Transformer, generate, load_run
from transformer_jax.cli import run_command
from transformer_jax.data.sources import Pairs, load
from transformer_jax.evaluate import answer
from transformer_jax.huggingface.folder import read_pretrained, write_pretrained

torch = pytest.importorskip("torch", reason="parity with transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs it")
load_file = pytest.importorskip("safetensors.numpy").load_file

LENGTH, SOURCE, ROWS, VOCAB = 23, 17, 3, 99
GROUPED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
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
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=44,
    decoder_ffn_dim=44,
    max_position_embeddings=64,
)
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=10, d_ff=44, num_layers=2, num_decoder_layers=3, num_heads=4)
GEMMA2 = dict(query_pre_attn_scalar=12, sliding_window=7)
EXPERTS = dict(num_experts_per_tok=2)


def theta(**rope):
    return dict(rope_parameters=dict(rope_theta=500.0) | rope)


CASES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, n_inner=44)),
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
        dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=44, num_hidden_layers=3, num_attention_heads=4)
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
    "gemma2": ("Gemma2", WIDE | GEMMA2 | dict(num_hidden_layers=4)),
    "gemma3_text": ("Gemma3Text", WIDE | GEMMA2 | dict(num_hidden_layers=7)),
    "phi3": ("Phi3", GROUPED | dict(sliding_window=7)),
    "phi3-partial": ("Phi3", GROUPED | theta(rope_type="default", partial_rotary_factor=0.5)),
    "mixtral": ("Mixtral", GROUPED | EXPERTS | dict(num_local_experts=3)),
    "qwen3_moe": (
        "Qwen3Moe",
        WIDE | EXPERTS | dict(num_experts=3, moe_intermediate_size=20, norm_topk_prob=True),
    ),
    "t5": ("T5", T5),
    "t5-even": ("T5", T5 | dict(num_layers=3)),  # their cache has as many layers as their encoder
    "t5-v1.1": ("T5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("MT5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART | dict(scale_embedding=True)),
    "marian": ("Marian", BART | dict(pad_token_id=VOCAB - 1, scale_embedding=True, activation_function="swish")),
    "pegasus": ("Pegasus", BART | dict(scale_embedding=True, activation_function="relu")),
    "t5gemma": (
        "T5Gemma",
        dict(encoder=WIDE | GEMMA2 | dict(sliding_window=5), decoder=WIDE | GEMMA2 | dict(num_hidden_layers=4)),
    ),
    "m2m_100": ("M2M100", BART | dict(scale_embedding=True, activation_function="relu")),
}


def architecture(name):
    name = name.removesuffix("Text")
    special = {"GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel"}
    seq = ("T5", "T5Gemma", "MT5", "Bart", "MBart", "Pegasus", "M2M100")
    return special.get(name, f"{name}{'ForConditionalGeneration' if name in seq else 'ForCausalLM'}")


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(the model, its folder), with random norms and biases too."""
    name, fields = CASES[request.param]
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
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def padded(seed, length, pad):
    """ids, and which are no padding: rows padded on the left, on the right, and full."""
    ids = np.random.default_rng(seed).integers(3, VOCAB - 1, (ROWS, length))
    mask = np.ones_like(ids)
    mask[0, :5], mask[1, -6:] = 0, 0
    ids[mask == 0] = pad
    return ids, mask


def tokens(ids, mask):
    places = np.maximum(np.cumsum(mask, -1) - 1, 0)
    return Tokens(*(np.asarray(x, np.int32) for x in (ids, mask, places)))


def logits_of(model, target, source):
    """Theirs, and which of them count."""
    ids, mask = target
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    if source is not None:
        inputs = dict(decoder_input_ids=torch.tensor(ids), decoder_attention_mask=torch.tensor(mask))
        inputs |= dict(input_ids=torch.tensor(source[0]), attention_mask=torch.tensor(source[1]))
    elif not any(kind in type(model).__name__ for kind in ("OPT",)):
        inputs["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, -1) - 1, 0))
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float().numpy()


def test_logits_agree(saved):
    """To 1e-4, over rows with padding on either side; of an encoder-decoder the target's is on the right."""
    model, folder = saved
    pad = model.config.pad_token_id or 0
    both = model.config.is_encoder_decoder
    ids, mask = padded(0, LENGTH, pad)
    if both:  # their decoders count places from the first column
        mask[0] = 1
        ids[0] = np.random.default_rng(9).integers(3, VOCAB - 1, LENGTH)
    source = padded(1, SOURCE, pad) if both else None
    if both and source is not None and "T5" not in type(model).__name__ and "M2M" not in type(model).__name__:
        source[1][0] = 1
        source[0][0] = np.random.default_rng(8).integers(3, VOCAB - 1, SOURCE)
    config, params = read_pretrained(folder)
    target = tokens(ids, mask)
    ours = Transformer(config).apply({"params": params}, target, tokens(*source) if source is not None else None)
    theirs = logits_of(model, (ids, mask), source)
    real = mask > 0
    assert np.abs(theirs[real]).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], rtol=0, atol=1e-4)


def test_what_goes_out_is_what_came_in(saved, tmp_path):
    """The same bytes in each tensor; `transformers` loads all of them, and nothing else, and computes the same."""
    model, folder = saved
    config, params = read_pretrained(folder)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    ids = {name: getattr(model.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    write_pretrained(tmp_path / "out", kind, config, params, **ids)
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = padded(0, LENGTH, model.config.pad_token_id or 0)
    mask[:] = 1
    source = (ids, mask) if model.config.is_encoder_decoder else None
    one, other = (logits_of(each.eval(), (ids, mask), source) for each in (model, again))
    np.testing.assert_array_equal(one, other)


def test_layers_in_a_loop_hold_the_same(saved):
    _, folder = saved
    config, params = read_pretrained(folder)
    if config.num_layers % len(config.windows):
        pytest.skip("its windows do not repeat")
    scanned, stacked = read_pretrained(folder, scan_layers=True)
    ids, mask = padded(0, LENGTH, 0)
    source = tokens(ids, mask) if config.mode == "encoder-decoder" else None
    one = Transformer(config).apply({"params": params}, tokens(ids, mask), source)
    other = Transformer(scanned).apply({"params": stacked}, tokens(ids, mask), source)
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-4)


# --- decoding

NEW = 12
every_decoded = pytest.mark.parametrize("saved", ["gpt2", "llama", "t5-even", "bart", "marian"], indirect=True)


def decoded(model, target, source, **options):
    """Their new tokens, int[B, NEW], padded."""
    ids, mask = target
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    if source is not None:
        inputs = dict(input_ids=torch.tensor(source[0]), attention_mask=torch.tensor(source[1]))
        inputs |= dict(decoder_start_token_id=int(ids[0, 0]))
    none = dict(forced_bos_token_id=None, forced_eos_token_id=None, bad_words_ids=None, do_sample=False)
    found = model.generate(**inputs, **none, **options, max_new_tokens=NEW, early_stopping="never")
    found = found[:, ids.shape[1] :].numpy()
    found = np.pad(found, [(0, 0), (0, NEW - found.shape[1])], constant_values=options["pad_token_id"])
    ended = np.cumsum(found == options["eos_token_id"], -1) - (found == options["eos_token_id"]) > 0
    return np.where(ended, options["pad_token_id"], found)  # by beam search they fill up with the end


@every_decoded
@pytest.mark.parametrize(
    "options", [{}, *({"num_beams": 4, "length_penalty": each} for each in (0.6, 1.0, 1.4))], ids=str
)
def test_generate_says_the_same(saved, options):
    """Greedily, and by a beam of 4 with three length penalties; the ends of texts come at different places."""
    model, folder = saved
    config, params = read_pretrained(folder)
    ours = Transformer(config)
    if model.config.is_encoder_decoder:
        ids, mask = np.full((ROWS, 1), 5), np.ones((ROWS, 1), int)
        source = padded(1, SOURCE, model.config.pad_token_id)
        if "T5" not in type(model).__name__:  # their encoders count places from the first column
            source[1][0], source[0][0] = 1, np.random.default_rng(8).integers(3, VOCAB - 1, SOURCE)
    else:
        (ids, mask), source = padded(0, 9, 0), None
        mask[1], ids[1] = 1, np.random.default_rng(7).integers(3, VOCAB - 1, 9)  # they take padding on the left
    pad = model.config.pad_token_id or 0
    args = dict(source=tokens(*source) if source is not None else None, max_new_tokens=NEW, pad_id=pad)
    free = np.asarray(generate(ours, params, tokens(ids, mask), **args).ids)
    end = int(free[0, 3])  # a token that is said
    beam = dict(beam_size=options["num_beams"], length_penalty=options["length_penalty"]) if options else {}
    found = np.asarray(generate(ours, params, tokens(ids, mask), eos_id=end, **args, **beam).ids)
    theirs = decoded(model, (ids, mask), source, eos_token_id=end, pad_token_id=pad, **options)
    np.testing.assert_array_equal(found, theirs)
    assert options or (found == end).any()


# --- runs that were trained here

FITS = {
    "decoder-only": "--model.mode decoder-only --model.gated True --model.activation silu",
    "encoder-decoder": "--model.position t5 --model.activation relu --model.query-scale 1 --model.scale-logits True "
    "--model.num-encoder-layers 3",
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=FITS)
def trained(request, tmp_path_factory):
    """A run of `python train.py dates` whose model a family has, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    words = f"train.py dates --steps 300 --eval-every 300 --num-samples 20 --workdir {folder / 'run'}".split()
    words += ["--model.scale-embeddings", "False", *FITS[request.param].split()]
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, capture_output=True)
    assert run_command(["export", str(folder / "run"), str(folder / "out")]) == 0
    both = request.param == "encoder-decoder"
    kind = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    return folder, kind, both


def test_a_trained_run_says_the_same_there(trained):
    """The same answers, greedily, to 100 dates, each prompted by its exported tokenizer; no key is missing or left."""
    folder, kind, both = trained
    run, held_out = load_run(folder / "run"), load((), (), "dates", 0.1)[1]
    assert isinstance(held_out, Pairs)
    texts, most = held_out.sources[:100], run.config.max_new_tokens
    model, info = kind.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    theirs = []
    for text in texts:
        prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**prompt, max_new_tokens=most, do_sample=False, num_beams=1)[0]
        theirs.append(tokenizer.decode(out if both else out[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    assert theirs == answer(texts, run.model, run.params, run.config, run.tokenizer)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for an older name
def test_peft_loads_adapters(trained):
    """The logits of the base with the adapters in PEFT are those of the merged model here, to 1e-4."""
    peft = pytest.importorskip("peft", reason="adapters are loaded by PEFT")
    folder, kind, both = trained
    words = f"train dates --init-from {folder / 'out'} --workdir {folder / 'tuned'} --steps 10 --eval-every 10".split()
    words += ["--num-samples", "5", "--tuning.lora", "attention/(query|out)=3", "feed_forward=2"]
    assert run_command(words) == 0
    assert run_command(["export", str(folder / "tuned"), str(folder / "adapter"), "--adapter"]) == 0
    run, draw = load_run(folder / "tuned"), np.random.default_rng(0)
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "out"), folder / "adapter").eval()
    ids, source = draw.integers(5, 200, (2, 30)), draw.integers(5, 200, (2, 20)) if both else None
    names = ("input_ids", "decoder_input_ids") if both else ("input_ids",)
    given = [torch.tensor(x) for x in (source, ids) if x is not None]
    with torch.no_grad():
        theirs = model(**dict(zip(names, given, strict=True))).logits.numpy()
    read = None if source is None else Tokens.from_ids(source)
    ours = run.model.apply({"params": run.params}, Tokens.from_ids(ids), read)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-4)
