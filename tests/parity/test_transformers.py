"""Parity with `transformers`: models that it makes and saves give its logits here, and go back as they came."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from agreement import BEAM, comes_back, logits, logits_agree, target_and_source, texts_agree

from transformer_jax import Tokens, load_run
from transformer_jax.cli import run_command
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.sources import load
from transformer_jax.evaluate import answer
from transformer_jax.huggingface.folder import read_pretrained

torch = pytest.importorskip("torch", reason="parity with transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs it")
from oracle import CASES, DECODED, build, decoded, expected, inputs_of, logits_of, prompts_of  # noqa: E402


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(the model, its folder, what it computes)."""
    model, folder = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder, expected(model, request.param in DECODED)


def test_logits_agree(saved):
    _, folder, found = saved
    logits_agree(folder, found)


def test_what_goes_out_is_what_came_in(saved, tmp_path):
    """The same bytes in each tensor; `transformers` loads all of them, and nothing else, and computes the same."""
    model, folder, found = saved
    ids = {name: getattr(model.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    comes_back(folder, tmp_path / "out", **ids)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits_of(again.eval(), inputs_of(model)), found["logits"])


@pytest.mark.slow
def test_layers_in_a_loop_hold_the_same(saved):
    _, folder, found = saved
    config, params = read_pretrained(folder)
    stacks = [config.of_stack(stack) for stack in ("encoder", "decoder")]
    if any(stack.num_layers % len(stack.windows) for stack in stacks):
        pytest.skip("its windows do not repeat")
    scanned, stacked = read_pretrained(folder, scan_layers=True)
    one, other = (logits(*each, *target_and_source(found)) for each in ((config, params), (scanned, stacked)))
    real = found["mask"] > 0
    np.testing.assert_allclose(one[real], other[real], rtol=0, atol=1e-4)


def test_a_model_without_an_output_layer_is_read_as_its_tied_one(tmp_path):
    """As `facebook/bart-base` is saved: no prefix, no bias of the logits."""
    model = build("bart")
    model.final_logits_bias.zero_()
    model.model.save_pretrained(tmp_path)
    logits_agree(tmp_path, expected(model))


@pytest.mark.parametrize("saved", DECODED, indirect=True)
@pytest.mark.parametrize("penalty", [None, 1.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.6, 1.4))])
def test_texts_agree(saved, penalty):
    _, folder, found = saved
    texts_agree(folder, found, penalty)


@pytest.mark.parametrize("saved", DECODED, indirect=True)
def test_beams_that_end_early_agree(saved):
    model, folder, found = saved
    theirs = decoded(model, prompts_of(model), int(found["end"]), num_beams=BEAM, early_stopping=True)
    texts_agree(folder, found | {"beam_1.0": theirs}, 1.0, early_stopping=True)


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


@pytest.mark.slow
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


@pytest.mark.slow
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
