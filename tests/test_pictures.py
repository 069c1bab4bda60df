"""Laws of attention that is looked at: weights are those that the model uses, and a picture shows all of them."""

import functools
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.image import imread
from test_cli import call, every_mode, quick, train  # noqa: F401 - the fixture is for this file too
from variants import ROWS, SOURCE, TARGET, document, example, has_source, pack, variables, variant

from transformer_jax import Transformer
from transformer_jax.config import DataConfig, RunConfig
from transformer_jax.data.tokenizer import make_tokenizer, sentinels
from transformer_jax.model.attention import Attention, sees
from transformer_jax.pictures import KINDS, Maps, attention_of, draw, labels, look
from transformer_jax.run import Run, load_run
from transformer_jax.verify import stacked

PROMPT = "01.02.2003"
LABELS = ("none-prefix", "t5-cross", "rope-gqa", "rope-llama3", "alibi-cross", "experts-scan", "bfloat16")
every_label = pytest.mark.parametrize("label", LABELS)


def inputs(config):
    """Two documents in a row with padding around them, and their sources; the second source is in front."""
    first, second = (document(config, seed, 8) for seed in (1, 2))
    target = pack(TARGET, (1, first), (9, second))
    source = pack(SOURCE, (7, document(config, 3, 6)), (0, document(config, 4, 5)))
    return target, source if has_source(config) else None


@functools.cache
def weights(label, mode):
    config = variant(label, mode)
    return attention_of(Transformer(config), variables(config)["params"], *inputs(config))


def softmax(logits):
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


# --- weights


@every_mode
@every_label
def test_weights_are_shares_of_what_is_seen(label, mode):
    """Those of each query add up to 1, to 1e-5, over the keys that `sees` lets it see; those of padding are 0."""
    config, found = variant(label, mode), weights(label, mode)
    target, source = inputs(config)
    assert list(found) == (list(KINDS) if has_source(config) else ["self"])
    kinds = {"encoder": (source, source, False), "self": (target, target, True), "cross": (target, source, False)}
    for kind, each in found.items():
        layers = config.num_encoder_layers if kind == "encoder" else config.num_layers
        queries, keys, causal = kinds[kind]
        assert each.shape == (layers, ROWS, config.num_heads, queries.ids.shape[1], keys.ids.shape[1])
        assert each.dtype == np.float32
        for layer, weights_BHTS in enumerate(each):
            windows = (
                (0,) if kind == "cross" else config.of_stack("encoder" if kind == "encoder" else "decoder").windows
            )
            window = windows[layer % len(windows)]
            seen_BHTS = np.broadcast_to(np.asarray(sees(queries, keys, causal, window))[:, None], weights_BHTS.shape)
            np.testing.assert_array_equal(weights_BHTS > 0, seen_BHTS)
            np.testing.assert_allclose(weights_BHTS.sum(-1), seen_BHTS.any(-1), atol=1e-5)


def test_weights_are_a_softmax():
    """Of queries and keys by NumPy, from the embedding on, to 1e-5."""
    config = variant("none-prefix")
    params, (target, _) = variables(config)["params"], example(config)
    block = params["decoder"]["block_0"]
    norm, attention = block["self_attention_residual"]["before"], block["self_attention"]
    x_BTD = params["embedding"]["table_VD"][np.asarray(target.ids)] * config.d_model**0.5
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    x_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + config.norm_eps)
    x_BTD = x_BTD * norm["scale_D"] + norm["bias_D"]
    query, key = attention["query"], attention["key"]
    q_BTHK = np.einsum("BTD,DHK->BTHK", x_BTD, query["w_DHK"]) + query["b_HK"]
    k_BSHK = np.einsum("BSD,DHK->BSHK", x_BTD, key["w_DGK"]) + key["b_GK"]
    logits_BHTS = np.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) * config.head_dim**-0.5
    T = np.arange(TARGET)
    seen_TS = (T[:, None] >= T) | (T < 2)  # the first two tokens are a prefix that sees all of itself
    wanted = softmax(np.where(seen_TS, logits_BHTS, -np.inf))
    found = attention_of(Transformer(config), variables(config)["params"], target, None)["self"]
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


def test_weights_make_the_output():
    """What each attention returns is its weighted values, projected, to 1e-5."""
    config, calls = variant("rope-gqa", "encoder-decoder"), {}

    def note(method, args, kwargs, context):
        out = method(*args, **kwargs)
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            calls["/".join(context.module.path)] = args[1].v_BSGK, out
        return out

    def forward(params, *given):
        with nn.intercept_methods(note):
            Transformer(config).apply({"params": params}, *given)
        return calls

    params, found = variables(config)["params"], weights("rope-gqa", "encoder-decoder")
    calls = jax.jit(forward)(params, *inputs(config))
    for kind, (_, stack, sublayer) in KINDS.items():
        v_BSGK, out_BTD = calls[f"{stack}/block_0/{sublayer}"]
        v_BSHK = np.repeat(v_BSGK, config.num_heads // config.num_kv_heads, 2)
        w_HKD = params[stack]["block_0"][sublayer]["out"]["w_HKD"]
        wanted = np.einsum("BHTS,BSHK,HKD->BTD", found[kind][0], v_BSHK, w_HKD)
        np.testing.assert_allclose(out_BTD, wanted, atol=1e-5)


def test_a_scan_changes_no_weights():
    """Layers that are scanned over come in their order, to 1e-5."""
    config = variant("rope-llama3", "encoder-decoder").replace(num_layers=4, num_encoder_layers=2)
    params = variables(config)["params"]
    one = attention_of(Transformer(config), params, *inputs(config))
    model = Transformer(config.replace(scan_layers=True))
    other = attention_of(model, stacked(params, config), *inputs(config))
    for kind in one:
        np.testing.assert_allclose(other[kind], one[kind], atol=1e-5)


@pytest.mark.parametrize(("label", "mode"), [("plain", "encoder-decoder"), ("experts-scan", "decoder-only")])
def test_nobody_looks_nothing_changes(label, mode):
    """Without the collection the weights are computed once, `apply` and `init` return what they did, to the bit."""
    config = variant(label, mode)
    model, params, given = Transformer(config), variables(config)["params"], inputs(config)

    def forward(**options):
        return lambda params: model.apply({"params": params}, *given, **options)

    def exponentials(function):
        return str(jax.make_jaxpr(function)(params)).count(" exp ")

    plain, looked = forward(), forward(mutable=["attention"])
    sublayers = {"decoder-only": 1, "encoder-decoder": 3}[mode] * (2 if label == "experts-scan" else 1)
    assert exponentials(looked) - exponentials(plain) >= sublayers
    logits_BTV, (looked_BTV, sown) = jax.jit(plain)(params), jax.jit(looked)(params)
    assert set(sown) == {"attention"}
    np.testing.assert_array_equal(logits_BTV, looked_BTV)
    assert set(jax.eval_shape(model.init, jax.random.key(0), *given)) == {"params"}


# --- labels


@pytest.mark.parametrize("kind", ["bytes", "bpe", "char", "unigram"])
def test_labels_are_the_text(kind):
    """Together they are the text with visible spaces; special tokens have their names; nothing is unprintable."""
    text = "Aé 中🙂, $x_1$\ttab  two\n"
    tokenizer = make_tokenizer(kind, 300, lambda: [text * 9, "and other letters"], sentinels(2))
    found = labels(tokenizer, tokenizer.encode([text])[0])
    together = "".join(label.removesuffix("…") for label in found).removeprefix("▁")  # that unigram puts in front
    assert together == text.replace(" ", "␣").replace("\t", "\\t").replace("\n", "\\n")
    ids = [tokenizer.bos_id, *tokenizer.encode(["é"])[0], tokenizer.sep_id, tokenizer.sentinel_ids[1], tokenizer.eos_id]
    names = labels(tokenizer, ids)
    assert (names[0], names[-4:]) == ("<bos>", ["é", "<sep>", "<extra_id_1>", "<eos>"])
    assert all(label and label.isprintable() for label in found + names)


# --- pictures


def maps(kind, layers, heads, queries, keys, letters="t"):
    weights_NHTS = np.full((layers, heads, queries, keys), 1 / keys, np.float32)
    return Maps(kind, weights_NHTS, [letters] * queries, [letters] * keys)


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_picture_has_every_map_and_label():
    """One image for each head of each layer, a row of labels below each column of them and beside each row."""
    figure = draw([maps("encoder", 2, 3, 5, 5, "<s>"), maps("cross", 1, 4, 2, 5)], "a title")
    texts = texts_of(figure)
    assert len(figure.axes[0].images) == 2 * 3 + 1 * 4
    assert (texts.count("<s>"), texts.count("t")) == (2 * 5 + 3 * 5, 1 * 2 + 4 * 5)
    assert [texts.count(f"layer {layer}") for layer in range(3)] == [2, 1, 0]
    assert "a title" in texts


def test_what_cannot_be_read_is_left_out():
    """And the title says so."""
    figure = draw([maps("self", 13, 17, 70, 70)], "")
    assert len(figure.axes[0].images) == 12 * 16
    assert figure.axes[0].images[0].get_array().shape == (64, 64)
    wanted = "the first 12 of 13 layers, 16 of 17 heads, 64 of 70 rows, 64 of 70 columns"
    assert f"{KINDS['self'][0]}: {wanted}" in texts_of(figure)


@pytest.mark.parametrize(
    "letters", ["$x$", "a_b^{", "\\frac", "中文", "🙂", "שלום", "e\u0301", "\u0301", "\ue000", "x" * 40]
)
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_any_letter_can_be_drawn(letters, ending, tmp_path):
    """Without a warning, also where no font has it; a long label is cut."""
    figure = draw([maps("self", 1, 1, 2, 2, letters)], letters)
    figure.savefig(tmp_path / f"out.{ending}")
    assert all(len(text) <= 12 for text in texts_of(figure)[-2:])


@functools.cache
def trained(mode):
    """A run of one step."""
    run = Path(f"looked-at-{mode}").absolute()
    status, _, err = train(run, mode, "--steps 1 --eval-every 1 --checkpoint.every 1 --num-samples 0")
    assert status == 0, err
    return run


@pytest.mark.parametrize(
    "mode",
    [pytest.param("encoder-decoder", marks=pytest.mark.long), pytest.param("decoder-only", marks=pytest.mark.slow)],
)
def test_describe_draws_what_is_said(mode):
    """The decoder's tokens are what `generate` says, or the target; the file has the size of the figure."""
    run = trained(mode)
    said = call("generate", run, "--prompt", PROMPT)[1][:-1]
    for target in (None, "2003-02"):
        words = [] if target is None else ["--target", target]
        status, out, err = call("describe", run, "--attention out.png --prompt", PROMPT, words)
        assert (status, err) == (0, "")
        assert out.startswith("out.png: ")
        assert out.count("\n") == 1
        every = look(load_run(run), PROMPT, target)
        assert [each.kind for each in every] == (["self"] if mode == "decoder-only" else list(KINDS))
        start = ["<bos>"] if mode == "encoder-decoder" else ["<bos>", *PROMPT, "<sep>"]
        assert every[-1].queries[: len(start)] == start
        labels = [label for label in every[-1].queries[len(start) :] if not label.startswith("<")]  # text has no others
        assert labels == list((said if target is None else target).replace(" ", "␣"))
        assert every[-1].keys == ([*PROMPT, "<eos>"] if mode == "encoder-decoder" else every[-1].queries)
        figure, picture = draw(every, ""), imread("out.png")
        wide, tall = figure.get_size_inches() * figure.dpi
        assert picture.shape[:2] == pytest.approx((tall, wide), abs=1)
        assert len(np.unique(picture[..., 0])) > 20


@pytest.mark.parametrize(
    ("objective", "mode", "prompt", "target", "queries", "keys"),
    [
        ("sequence-to-sequence", "decoder-only", "ab", "c", "<bos> a b <sep> c", None),
        ("causal", "decoder-only", "ab", "c", "<bos> a b c", None),
        (
            "span-corruption",
            "encoder-decoder",
            "a<extra_id_0>",
            "<extra_id_0>b",
            "<bos> <extra_id_0> b",
            "a <extra_id_0> <eos>",
        ),
    ],
)
def test_texts_are_read_as_in_training(objective, mode, prompt, target, queries, keys):
    """With the tokens of the objective, and a prefix that sees all of itself where there is one."""
    tokenizer, prefix = make_tokenizer("char", 0, lambda: ["abc"], sentinels(1)), objective == "sequence-to-sequence"
    model = variant("none-prefix", mode).replace(
        vocab_size=tokenizer.size, prefix_attention="bidirectional" if prefix else "causal"
    )
    config = RunConfig(model=model, data=DataConfig(objective=objective))
    run = Run(config, Transformer(model), variables(model)["params"], tokenizer, 0)
    every = {each.kind: each for each in look(run, prompt, target)}
    last = every["self" if keys is None else "cross"]
    assert (last.queries, last.keys) == (queries.split(), (keys or queries).split())
    seen_TS = every["self"].weights_NHTS[0, 0] > 0
    wanted_TS = np.tri(len(seen_TS), dtype=bool)
    wanted_TS[:4, :4] |= prefix
    np.testing.assert_array_equal(seen_TS, wanted_TS)


BAD = {
    "--attention out.png": "--prompt and --attention need each other",
    "--prompt 1": "--prompt and --attention need each other",
    "--target 1": "--target and --checkpoint are for --attention",
    "--checkpoint best": "--target and --checkpoint are for --attention",
    "--prompt 1 --attention out.gif": "--attention out.gif must end in .png, .svg or .pdf",
    "--prompt 1 --attention no/out.png": "--attention no/out.png: cannot be written",
    "--prompt 1 --attention RUN/loss.png": "--attention .*loss.png: .* would be lost",
    "--prompt 1 --attention out.png --checkpoint 5": "no checkpoint '5'",
    "--prompt 1 --attention out.png --model.d-model 32": "--model.d-model: not with --attention",
    "--prompt 1 --attention out.png --devices 2": "--devices: not with --attention",
    f"--prompt {'1' * 40} --attention out.png": "--prompt: 42 tokens, and a new one, .* max_length=32",
    f"--prompt 1 --attention out.png --target {'1' * 40}": "--target: 40 tokens, after 3 others, .* max_length=32",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_inputs_are_refused(words):
    """With status 2 and a message that names the flag, before anything is written."""
    run = trained("decoder-only")
    before = (run / "loss.png").read_bytes()
    Path("out.png").unlink(missing_ok=True)
    status, out, err = call("describe", run, words.replace("RUN", str(run)))
    assert (status, out) == (2, "")
    assert re.search(BAD[words], " ".join(err.replace("│", "").split()))
    assert not Path("out.png").exists()
    assert (run / "loss.png").read_bytes() == before


def test_only_a_trained_run_is_drawn():
    words = "--prompt 1 --attention out.png"
    assert "draws a trained run" in call("describe dates", words)[2]
    Path("fresh").mkdir()
    shutil.copy(trained("decoder-only") / "config.json", "fresh")
    status, out, err = call("describe fresh", words)
    assert (status, out) == (2, "")
    assert "without a checkpoint" in err
