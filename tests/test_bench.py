"""Laws of benchmarks: the ways that are compared do the same work, and pages keep what is not theirs."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer_jax.bench import attention, compile, data, generate, jit, measure, memory, pairs, train
from transformer_jax.bench.command import BENCHES, benchmark, placed
from transformer_jax.bench.subject import Subject
from transformer_jax.cli import run_command
from transformer_jax.config import ModelConfig
from transformer_jax.data.batches import draw_checked
from transformer_jax.hlo import read_program

ROOT = Path(__file__).parent.parent
SMALL = dict(vocab_size=50, d_model=16, num_layers=2, num_heads=2, max_length=32, position="learned")
CASES = {
    "decoder": generate.Case(ModelConfig(mode="decoder-only", **SMALL), 2, 6, 8),
    "both": generate.Case(ModelConfig(**SMALL), 3, 6, 8),
    "beams": generate.Case(ModelConfig(**SMALL), 3, 6, 8, beam_size=3, uncached=False),
}


@pytest.fixture
def clock(monkeypatch):
    """A clock for what is measured, which goes on only when something sleeps by it."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


@pytest.mark.parametrize("name", ["decoder", "both"])
@pytest.mark.long
def test_all_ways_say_the_same(name, monkeypatch):
    """With a cache and without one, and with the source's keys computed again at each step."""
    monkeypatch.setattr(generate.peers, "gpt2", lambda *_: None)
    monkeypatch.setattr(generate.peers, "bart", lambda *_: None)
    found = {way: np.asarray(function()) for way, function in generate.ways(CASES[name]).items()}
    assert list(found) == ["no cache", "cache", "cache, source keys kept"][: 2 + (name == "both")]
    for ids in found.values():
        assert ids.shape == (CASES[name].batch, 8)
        np.testing.assert_array_equal(ids, found["no cache"])


def test_the_source_keys_are_computed_in_the_loop():
    """And not once before it, which is what the compiler would make of them."""
    case = CASES["both"]
    model, params = generate.Transformer(case.config), generate.random_params(case.config)
    tokens = generate.Tokens.from_ids(np.ones((3, 6), np.int32))
    text = generate.without_source_keys.lower(model, params, tokens, tokens, 8).compile().as_text()
    assert re.search(r'op_name="[^"]*while/body[^"]*remember[^"]*dot_general', text)


def test_a_result_is_a_table_a_page_and_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "CASES", CASES)
    monkeypatch.setattr(generate, "read_bandwidth", lambda: 1e10)
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("# Before\n\n<!-- generate: start -->\nold\n<!-- generate: end -->\n\nafter\n")
    words = ["bench", "generate", "--repeats", "2", "--json", str(out), "--markdown", str(page)]
    assert run_command(words) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["repeats"] == 2
    assert result["commit"] is None or len(result["commit"]) == 40
    assert result["versions"]["jax"] == jax.__version__
    for name, case in result["cases"].items():
        assert name in printed
        rates = [row["tokens_per_second"] for row in case["ways"].values()]
        assert all(rate > 0 for rate in rates)
        assert all(len(row["seconds"]) == 2 for row in case["ways"].values())
        ours = [row for way, row in case["ways"].items() if way != "transformers"][-1]
        assert ours["ours_is_faster_by"] == 1
        assert case["share_of_bound"] == pytest.approx(
            ours["tokens_per_second"] / case["bound_tokens_per_second"], rel=1e-6
        )
    text = page.read_text()
    assert text.startswith("# Before\n\n<!-- generate: start -->\n| case |")
    assert text.endswith("<!-- generate: end -->\n\nafter\n")
    assert "old" not in text


def test_a_page_without_the_table_gets_it_at_the_end(tmp_path):
    page = tmp_path / "page.md"
    assert placed(page, "x", "new") == "new\n"
    page.write_text("# Page\n")
    assert placed(page, "x", "new") == "# Page\n\nnew\n"


def test_ways_take_turns():
    """Each is warmed up once; then all of them come in each round; a ratio is that of the turns."""
    calls = []
    functions = {name: (lambda name=name: calls.append(name) or np.zeros(1)) for name in "ab"}
    times = measure.interleaved(functions, 3)
    assert "".join(calls) == "ab" + "ab" * 3
    assert all(len(each.each) == 3 for each in times.values())
    fast, slow = measure.Times(0, (1.0, 2.0, 1.0)), measure.Times(0, (3.0, 2.0, 4.0))
    assert measure.ratio(fast, slow) == 3
    assert (fast.median, slow.spread) == (1.0, 2 / 3)


# --- training

SUBJECTS = {
    mode: Subject(ModelConfig(mode=mode, **SMALL | dict(num_layers=1, activation="gelu")), batch=2, length=8)
    for mode in ("decoder-only", "encoder-decoder")
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["decoder-only", "encoder-decoder"])
def test_all_ways_to_compile_make_the_same_step(mode):
    functions, costs = jit.ways(SUBJECTS[mode], lambda _: None)
    assert list(functions) == [jit.NO_JIT, jit.BY_FUNCTION, *jit.WHOLE]
    found = {way: jax.device_get(function()) for way, function in functions.items()}
    first = {way: {name: np.ravel(x)[0] for name, x in metrics.items()} for way, metrics in found.items()}
    for way in (way for way in first if "scan" not in way):  # layers that are stacked start with other numbers
        for name, value in first[way].items():
            np.testing.assert_allclose(value, first[jit.NO_JIT][name], rtol=2e-5, err_msg=f"{way}: {name}")
    assert found[f"donated, {jit.STEPS} steps a call"]["loss"].shape == (jit.STEPS,)
    plain = costs[jit.PLAIN]
    assert all(plain[name] > 0 for name in ("trace_seconds", "compile_seconds", "cached_seconds", "bytes_accessed"))
    assert costs["donated, remat"]["matrix_flops"] > plain["matrix_flops"]
    assert costs["donated, scan over layers"]["matrix_flops"] == plain["matrix_flops"]


def test_the_benchmark_of_jit_says_when_it_is_paid_back(monkeypatch, clock, tmp_path, capsys):
    seconds = {jit.NO_JIT: 0.05, jit.PLAIN: 0.001, "jit of the step": 0.1}
    cost = dict(trace_seconds=0.2, compile_seconds=0.3, cached_seconds=0.1, bytes_accessed=1e6, matrix_flops=1e6)

    def ways(subject, say):
        functions = {way: lambda time_=time_: clock.sleep(time_) for way, time_ in seconds.items()}
        return functions, {way: dict(cost) for way in seconds if way != jit.NO_JIT}

    monkeypatch.setattr(jit, "ways", ways)
    monkeypatch.setattr(jit, "TURN", 0)
    monkeypatch.setattr(jit, "peak_flops", lambda: {"flops_per_second": 1e11, "source": "a test"})
    out, chart = tmp_path / "out.json", tmp_path / "chart.png"
    words = ["bench", "jit", "--case", "decoder-only", "--repeats", "3", "--json", str(out), "--plot", str(chart)]
    assert run_command(words) == 0
    rows = json.loads(out.read_text())["cases"]["decoder-only"]["ways"]
    row = rows[jit.PLAIN]
    assert row["steps_until_paid"] == 11  # (0.2 + 0.3) / (0.05 - 0.001)
    assert row["faster_than_no_jit_by"] == pytest.approx(50)
    assert rows["jit of the step"]["steps_until_paid"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert f"at step {row['steps_until_paid']}." in printed
    assert "never" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_of_attention_runs_what_fits(monkeypatch, tmp_path):
    """The same gradients by all that fit, and the reasons of those that don't."""
    monkeypatch.setattr(attention, "CASES", {"16": attention.Case(2, 16, heads=2, head_dim=8)})
    monkeypatch.setattr(attention, "TURN", 0)
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    assert run_command(["bench", "attention", "--repeats", "2", "--json", str(out), "--markdown", str(page)]) == 0
    case = json.loads(out.read_text())["cases"]["16"]
    assert (set(case["ways"]), set(case["unfit"])) == ({"reference", "blocks", "xla"}, {"cudnn", "splash"})
    assert case["auto"][0] == "reference"
    assert "it needs a GPU, and this is cpu" in page.read_text()
    inputs = [jax.random.normal(jax.random.key(seed), (2, 16, 2, 8)) for seed in range(3)]
    for one, other in zip(*(attention._gradients(name, *inputs) for name in ("reference", "xla")), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.long
def test_the_benchmark_of_training_counts_tokens_and_flops(monkeypatch, tmp_path):
    """By itself, and beside a peer whose step takes a known time."""
    monkeypatch.setattr(train, "CASES", {"small": train.Case(SUBJECTS["encoder-decoder"], "torch")})
    monkeypatch.setattr(train, "TURN", 0)
    monkeypatch.setattr(train, "peak_flops", lambda: {"flops_per_second": 1e11, "source": "a test"})
    out = tmp_path / "out.json"
    for peer, ways in ((None, ["transformer_jax"]), (("slow", lambda: time.sleep(0.2)), ["transformer_jax", "slow"])):
        monkeypatch.setattr(train.peers, "training", lambda *_, peer=peer: peer)
        assert run_command(["bench", "train", "--repeats", "2", "--json", str(out)]) == 0
        case = json.loads(out.read_text())["cases"]["small"]
        assert list(case["ways"]) == ways
        assert case["tokens"] == 2 * 2 * 8
        assert case["ways"]["transformer_jax"]["matrix_flops"] > 6 * 16 * 50 * 16
    assert case["ways"]["slow"]["ours_is_faster_by"] > 1


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", SUBJECTS)
def test_flops_by_shapes_are_those_of_the_compiled_step(mode, tied):
    """Three times the forward pass, counted from shapes, is what XLA's program multiplies."""
    subject = SUBJECTS[mode]._replace(config=SUBJECTS[mode].config.replace(tie_embeddings=tied))
    step, state = subject.step()[1], jax.eval_shape(subject.first, jax.random.key(0))
    text = jax.jit(step).lower(state, subject.draw()).compile().as_text()
    assert subject.flops == sum(product.flops * product.times for product in read_program(text)[0])


def test_turns_are_as_many_calls_as_fit(clock):
    calls = []
    function = lambda: calls.append(clock.sleep(1 / 16)) or np.zeros(1)  # noqa: E731
    times = measure.interleaved({"a": function}, 2, turn=0.6)["a"]
    assert len(calls) == 2 + 2 * 9
    assert times.each == (1 / 16, 1 / 16)


@pytest.mark.slow
def test_the_benchmark_of_compiling_tells_loops_from_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "CASES", {"small": SUBJECTS["decoder-only"]})
    monkeypatch.setattr(compile, "LAYERS", (1, 2))
    out = tmp_path / "out.json"
    assert run_command(["bench", "compile", "--repeats", "1", "--json", str(out)]) == 0
    sizes = {
        (layers, way): row["module_bytes"]
        for layers, ways in json.loads(out.read_text())["cases"]["small"].items()
        for way, row in ways.items()
    }
    assert sizes["2", "scan"] < 1.1 * sizes["1", "scan"]
    assert sizes["2", "unrolled"] > 1.3 * sizes["1", "unrolled"]


def drawn_slowly(*args):
    time.sleep(0.3)
    return draw_checked(*args)


@pytest.mark.slow
def test_the_benchmark_of_data_says_what_is_waited_for(monkeypatch, tmp_path, capsys):
    """A pipeline that is made slow is waited for."""
    small = dict(d_model=16, num_layers=1, num_encoder_layers=1, d_ff=16)
    quick = dataclasses.replace(data.CASES["dates"], model=data.CASES["dates"].model.replace(**small), batch_size=2)
    monkeypatch.setattr(data, "CASES", {"quick": quick})
    monkeypatch.setattr(data, "DRAWN", 5)
    out = tmp_path / "out.json"

    def measured():
        assert run_command(["bench", "data", "--repeats", "2", "--json", str(out)]) == 0
        return json.loads(out.read_text())["cases"]["quick"]

    found = measured()
    assert 0 <= found["data_wait"] < 0.9
    assert found["tokens_a_batch"] > 2 * quick.data.target_length / 2
    monkeypatch.setattr(data, "draw_checked", drawn_slowly)
    slow = measured()
    assert slow["data_wait"] > 0.6
    assert slow["ways"][data.PIPELINE]["faster_than_steps_by"] < found["ways"][data.PIPELINE]["faster_than_steps_by"]
    assert "% of the time" in capsys.readouterr().out


SMALL_RUN = dataclasses.replace(
    pairs.CASES["encoder-decoder"].run,
    model=pairs.CASES["encoder-decoder"].run.model.replace(d_model=8, d_ff=8, num_layers=1, num_encoder_layers=1),
    data=dataclasses.replace(pairs.CASES["encoder-decoder"].run.data, tokenizer="bytes"),
)


@pytest.mark.parametrize("mode", ["encoder-decoder", pytest.param("decoder-only", marks=pytest.mark.long)])
def test_packed_and_padded_batches_hold_the_same_pairs(monkeypatch, tmp_path, mode):
    """The peer gets what our rows hold, pair by pair; rates count what is not padding."""
    run = dataclasses.replace(SMALL_RUN, model=SMALL_RUN.model.replace(mode=mode))
    monkeypatch.setattr(pairs, "CASES", {mode: pairs.Case(run, "peer")})
    monkeypatch.setattr(pairs, "PAIRS", 4)
    monkeypatch.setattr(pairs, "STEPS", 2)
    seen = []
    monkeypatch.setattr(
        pairs.peers, "training", lambda kind, config, batches: seen.extend(batches) or ("it", lambda: np.zeros(1))
    )
    file, out = tmp_path / "pairs.tsv", tmp_path / "out.json"
    file.write_text("".join(f"{'a' * (n % 5 + 1)}\t{'b' * (n % 3 + 1)}\n" for n in range(60)))
    assert run_command(["bench", "pairs", "--data", str(file), "--repeats", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    ways = result["cases"][mode]["ways"]
    assert result["data"] == "pairs.tsv"
    assert len(seen) == 2
    for batch in seen:
        *sides, labels = batch
        assert len(sides) == 1 + (mode == "encoder-decoder")
        assert all(len(ids) == 4 for ids in batch)
        learned = (labels != 0).sum(-1)
        assert ((learned >= 2) & (learned <= 4)).all()  # 1 to 3 letters and the end
        for read, said in zip(sides[-1], labels, strict=True):  # each label is what is read next
            places = np.flatnonzero(said[:-1] * read[1:])
            np.testing.assert_array_equal(said[places], read[places + 1])
    assert ways["it"]["tokens"] == sum(int((side != 0).sum()) for *sides, _ in seen for side in sides)
    assert ways["it"]["share_of_places"] < ways["transformer_jax"]["share_of_places"] <= 1


@pytest.mark.long
def test_the_benchmark_of_memory_tells_parts_from_all(monkeypatch, tmp_path, capsys):
    large = ModelConfig(mode="decoder-only", **SMALL | dict(vocab_size=50_000, max_length=256))
    monkeypatch.setattr(memory, "CASES", {"large": Subject(large, 8, 256)})
    out = tmp_path / "out.json"
    assert run_command(["bench", "memory", "--json", str(out)]) == 0
    ways = json.loads(out.read_text())["cases"]["large"]["ways"]
    plain, whole, parts = (ways[name]["temp_bytes"] for name in (memory.PLAIN, memory.WHOLE, memory.PARTS))
    assert parts < 0.6 * whole < 0.6 * 1.1 * plain
    assert len({row["state_bytes"] for row in ways.values()}) == 1
    assert "turns" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "jot"], "jit"),
        (["bench", "jit", "--case", "decoder"], "decoder-only"),
        (["bench", "compile", "--plot", "x.png"], "no chart"),
        (["bench", "jit", "--plot", "x.pdf"], ".png"),
        (["bench", "jit", "--repeats", "0"], "at least 1"),
        (["bench", "jit", "--devices", "8"], "--devices: bench jit takes none"),
        (["bench", "memory", "--data", "x.tsv"], "--data: bench memory takes none"),
        (["bench", "pairs", "--data", "x", "y", "z"], "two parallel files"),
        (["bench", "pairs", "--data", "missing.tsv"], "missing.tsv"),
        (["bench", "strategies"], "--devices 8"),
    ],
)
def test_what_a_benchmark_cannot_take_is_said(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(run_command(words))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_script_for_a_gpu_needs_few_libraries():
    """It runs where only jax, flax and optax are, with what those bring."""
    hidden = ("tyro", "tokenizers", "einops", "matplotlib", "tensorboardX", "sacrebleu", "grain")
    lines = [
        "import sys",
        f"sys.modules |= dict.fromkeys({hidden})",  # None there is a module that cannot be imported
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})",
        "import bench_gpu, transformer_jax.bench.command",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def test_every_benchmark_has_its_module():
    for name in BENCHES:
        assert benchmark(name).CASES
