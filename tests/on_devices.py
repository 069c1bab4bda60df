"""Laws of several devices. `test_partition.py` runs this file with 8 simulated ones and in float64, which tells a sum
over devices that is missing, or there twice, from rounding."""

import functools
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from variants import CHOICES, variables, variant

from transformer_jax import ModelConfig, Tokens, Transformer, generate, int8_weights
from transformer_jax.bench import strategies
from transformer_jax.bench.subject import Subject
from transformer_jax.checkpoint import Checkpoints, restore
from transformer_jax.cli import run_command
from transformer_jax.config import CheckpointConfig, LossConfig, Mode, OptimizerConfig, ParallelConfig
from transformer_jax.huggingface.folder import read_pretrained, write_pretrained
from transformer_jax.objective import make_loss, token_sums
from transformer_jax.optimizer import make_optimizer
from transformer_jax.partition import Partitioner, part_bytes
from transformer_jax.run import example_inputs
from transformer_jax.step import TrainState, train_step
from transformer_jax.trainer import digest_of
from transformer_jax.verify import batches

DEVICES, ROWS = 8, 16
MOMENTUM = OptimizerConfig(
    name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0
)
SMOOTHING = LossConfig(label_smoothing=0.1, z_loss=1e-3)
MESHES = ("data=2,fsdp=2,tensor=2", "tensor=4,fsdp=2", "data=2,context=4", "data=2,context=2,tensor=2")
MODES = get_args(Mode)
WARNING = "Involuntary full rematerialization"
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def quiet(capfd):
    """XLA does not say that it gathers a whole array on every device to split it anew."""
    yield
    assert WARNING not in capfd.readouterr().err


@functools.cache
def on(strategy):
    """The partitioner of a strategy: jit, pmap, or the sizes of a mesh."""
    if strategy in ("jit", "pmap"):
        return Partitioner.create(ParallelConfig(strategy=strategy))
    return Partitioner.create(ParallelConfig(strategy="mesh", mesh=strategy))


def exact(label, mode, **changes):
    """A variant in float64, of one round of its windows."""
    config = variant(label, mode)
    layers = len(config.windows)
    kinds = dict(dtype="float64", param_dtype="float64", max_length=64)
    still = dict(dropout_rate=0.0, attention_dropout_rate=0.0)
    return config.replace(**kinds | still | dict(num_layers=layers, num_encoder_layers=layers) | changes)


def assert_same(got, wanted, tolerance=1e-12):
    """Trees that differ by less than `tolerance` times the largest number in them."""
    got, wanted = (jax.tree.map(np.asarray, tree) for tree in (got, wanted))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    got, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    assert len(got) == len(wanted)
    for (path, x), (_, y) in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


# --- logits and gradients


def numbers(config, strategy):
    """Logits, sums and gradients of a packed batch with padding; the last rows are empty."""
    model = Transformer(config)

    def loss(params, batch):
        logits_BTV = model.apply({"params": params}, batch.target, batch.source)
        sums = token_sums(logits_BTV, batch.labels, batch.weights, SMOOTHING)
        return sums["loss"], (sums, logits_BTV)

    batch, partitioner = batches(config, ROWS // 2, packed=True)[0], on(strategy)
    assert batch.target.segments.max() > 1
    assert batch.target.segments[-1].max() == 0
    params = partitioner.init(lambda params: params, variables(config)["params"])
    return partitioner.evaluate(jax.grad(loss, has_aux=True))(params, partitioner.put(batch))


def placed():
    """Every variant on every mesh in both modes, of which a choice is quick: one mesh each.

    With an encoder those are quick whose encoder or cross-attention is of its own kind.
    """
    own = ("learned-post", "t5-cross", "rope-gqa")
    others = ("t5", "learned-post", "rope-linear-cross", "rope-ntk-mqa", "rope-yarn-cross", "alibi-cross", "bfloat16")
    for number, label in enumerate(CHOICES):
        chosen = {
            "encoder-decoder": [number] if label in own else [],
            "decoder-only": [number + 2] if label not in others else [],
        }
        for mode in MODES:
            quick = [MESHES[place % len(MESHES)] for place in chosen[mode]]
            rest = [mesh for mesh in MESHES if mesh not in quick]
            for meshes, marks in ((quick, ()), (rest, pytest.mark.slow)):
                if meshes:
                    yield pytest.param(label, mode, meshes, id=f"{label}-{mode}", marks=marks)


@pytest.mark.parametrize(("label", "mode", "meshes"), list(placed()))
def test_numbers_are_those_of_one_device(label, mode, meshes):
    """Logits, sums and gradients on meshes, in float64: to 1e-12 of the largest."""
    config = exact(label, mode, vocab_size=23 if label in ("plain", "t5-cross") else 24)
    wanted = numbers(config, "jit")
    for mesh in meshes:
        assert_same(numbers(config, mesh), wanted)


# --- training steps


class Trained(NamedTuple):
    losses: list
    before: TrainState
    after: TrainState
    compiles: int


def program(config, partitioner, accumulate=1):
    """The first state of a config and its compiled step."""
    optimizer = make_optimizer(MOMENTUM, 10)
    params = variables(config)["params"]
    state = partitioner.init(lambda params: TrainState.create(params, optimizer, 0), params)
    step = functools.partial(
        train_step, loss=make_loss(Transformer(config), SMOOTHING), optimizer=optimizer, accumulate=accumulate
    )
    return state, partitioner.step(step, state)


@functools.cache
def trained(mode, strategy, accumulate=1, **changes):
    """Three steps of SGD with momentum, of batches whose rows are of unequal lengths and the last ones empty."""
    config, partitioner = exact("plain", mode, vocab_size=24, **changes), on(strategy)
    state, step = program(config, partitioner, accumulate)
    before = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    losses = []
    for batch in batches(config, ROWS, packed=False):
        tokens_N = batch.weights.reshape(DEVICES, -1).sum(-1)
        assert tokens_N.min() == 0
        assert len(set(tokens_N)) > DEVICES // 2
        state, metrics = step(state, partitioner.put(batch))
        assert metrics["tokens"] == tokens_N.sum()
        losses.append(metrics["loss"])
    return Trained(losses, before, state, step.compiles)


DROPOUT = dict(dropout_rate=0.2, attention_dropout_rate=0.2)
STRATEGIES = {
    "pmap": dict(),
    "data=8": DROPOUT,
    "fsdp=8": DROPOUT | dict(accumulate=2),
    "data=2,fsdp=2,tensor=2": DROPOUT,
    "data=2,context=2,tensor=2": DROPOUT,
}
SLOW = [("encoder-decoder", "data=2,context=2,tensor=2"), *((mode, "data=8") for mode in MODES)]
STEPS = [
    pytest.param(mode, strategy, marks=pytest.mark.slow if (mode, strategy) in SLOW else ())
    for mode in MODES
    for strategy in STRATEGIES
]


@pytest.mark.parametrize(("mode", "strategy"), STEPS)
def test_steps_are_those_of_one_device(mode, strategy):
    """Losses, parameters and momentum, where some devices hold only padding; on a mesh dropout is the same as well.

    The state is compiled for once and stays where it was born.
    """
    options = STRATEGIES[strategy]
    got, wanted = trained(mode, strategy, **options), trained(mode, "jit", **options)
    assert_same(got.losses, wanted.losses)
    assert_same((got.after.params, got.after.opt_state), (wanted.after.params, wanted.after.opt_state))
    assert got.compiles == wanted.compiles == 1
    for was, now in zip(jax.tree.leaves(got.before), jax.tree.leaves(got.after), strict=True):
        assert now.sharding.is_equivalent_to(was.sharding, now.ndim), (was.sharding, now.sharding)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(wanted.after.params), jax.tree.leaves(first(mode))))


def first(mode):
    return variables(exact("plain", mode, vocab_size=24))["params"]


@every_mode
def test_a_checkpoint_moves_between_topologies(mode, tmp_path):
    """Saved where every array is split, restored on one device, replicated, and split in another way: the same bits."""
    strategy = "data=2,fsdp=2,tensor=2"
    state = trained(mode, strategy, **STRATEGIES[strategy]).after
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.open()
        checkpoints.save(3, state, {}, {})
        checkpoints.wait()
        assert checkpoints.failures() == []
    create, params = (lambda params: TrainState.create(params, make_optimizer(MOMENTUM, 10), 0)), state.params
    for other in ("jit", "pmap", "fsdp=8", strategy):
        template = on(other).abstract(create, jax.tree.map(np.asarray, params))
        found = restore(tmp_path / "3", template)
        assert digest_of(found) == digest_of(state)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(template), strict=True):
            assert getattr(wanted, "sharding", None) is None or leaf.sharding.is_equivalent_to(
                wanted.sharding, leaf.ndim
            )


@pytest.mark.parametrize("strategy", ["jit", "pmap", "data=8"])
def test_another_shape_is_compiled_once_more(strategy):
    """Of any step; those above are compiled for once."""
    config, partitioner = exact("plain", "decoder-only"), on(strategy)

    def count(state, batch, reduce=lambda x: x, part=0):
        return state + reduce(jnp.sum(batch.weights)), part

    state = partitioner.init(jnp.zeros, ())
    step = partitioner.step(count, state)
    batch = batches(config, ROWS, packed=False)[0]
    shorter = jax.tree.map(lambda x: x[:, :24], batch)
    for each, compiles in ((batch, 1), (shorter, 2), (batch, 2), (shorter, 2)):
        before = float(state)
        state, _ = step(state, partitioner.put(each))
        assert state == before + each.weights.sum()
        assert step.compiles == compiles


# --- where the state is born


@every_mode
def test_state_is_born_in_equal_parts(mode):
    """With fsdp=8 no device holds more than an eighth of parameters and AdamW's moments, and 2 % of the whole."""
    config = ModelConfig(
        mode=mode, vocab_size=96, d_model=64, num_heads=4, num_layers=1, norm="rmsnorm", use_bias=False
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def create(key):
        params = Transformer(config).init(key, *example_inputs(config))["params"]
        return TrainState.create(params, optimizer, 0)

    state = on("fsdp=8").init(create, jax.random.key(0))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    for device in jax.devices():
        here = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device]
        assert sum(here) <= (1 / 8 + 0.02) * sum(leaf.nbytes for leaf in leaves)


def test_parameters_are_born_the_same_on_any_mesh():
    config = exact("rope-gqa", "decoder-only", vocab_size=24)

    def create(key):
        return Transformer(config).init(key, *example_inputs(config))["params"]

    wanted = flatten_dict(on("jit").init(create, jax.random.key(0)))
    got = flatten_dict(on("data=2,fsdp=2,tensor=2").init(create, jax.random.key(0)))
    assert got.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(got[path], wanted[path], rtol=1e-12, err_msg=str(path))


# --- dropout


def test_dropout_does_not_know_the_devices():
    """The loss of a batch with dropout on 1, 2, 4 and 8 devices of a mesh is that of one without; another key's not."""
    config = exact("rope-gqa", "decoder-only", vocab_size=24, **DROPOUT)
    loss = make_loss(Transformer(config), SMOOTHING)

    def sums(strategy):
        partitioner = on(strategy)
        params = partitioner.init(lambda params: params, variables(config)["params"])
        batch = partitioner.put(batches(config, ROWS, packed=False)[0])
        program = partitioner.evaluate(lambda params, both: loss(params, both[0], jax.random.key(both[1]))[1])
        return [program(params, (batch, jnp.uint32(seed))) for seed in (3, 4)]

    wanted = sums("jit")
    assert abs(wanted[0]["loss"] / wanted[1]["loss"] - 1) > 1e-6
    for strategy in ("data=1", "data=2", "data=4", "fsdp=4,tensor=2"):
        assert_same(sums(strategy), wanted)


def test_pmap_drops_out_differently_on_each_device():
    """Eight rows that are alike, one a device: the loss is the mean of those of the parts' own keys, all different."""
    config = exact("rope-gqa", "decoder-only", vocab_size=24, **DROPOUT)
    partitioner, optimizer = on("pmap"), make_optimizer(MOMENTUM, 10)
    row = jax.tree.map(lambda x: x[:1], batches(config, ROWS, packed=False)[0])
    state, step = program(config, partitioner)
    _, metrics = step(state, partitioner.put(jax.tree.map(lambda x: np.repeat(x, DEVICES, 0), row)))
    alone = TrainState.create(jax.tree.map(jnp.asarray, variables(config)["params"]), optimizer, 0)
    loss = make_loss(Transformer(config), SMOOTHING)
    part_of = jax.jit(
        lambda state, row, part: train_step(state, row, loss=loss, optimizer=optimizer, part=part)[1]["loss"]
    )
    losses = [float(part_of(alone, row, part)) for part in range(DEVICES)]
    assert len(set(losses)) == DEVICES
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-12)


# --- wrong input


@pytest.mark.parametrize("strategy", ["--parallel.strategy pmap", "--parallel.strategy mesh --parallel.mesh fsdp=-1"])
def test_a_batch_that_does_not_divide_is_answered(strategy, tmp_path, capfd):
    (tmp_path / "pairs.tsv").write_text("".join(f"{number}\t{number + 1}\n" for number in range(2000)))
    data = f"--data.train {tmp_path / 'pairs.tsv'} --data.tokenizer char --model.max-length 32"
    words = f"train pairs --batch-size 12 {data} --workdir {tmp_path / 'run'} {strategy}"
    assert run_command(words.split()) == 2
    message = capfd.readouterr().err
    assert "batch_size=12 must be a multiple of" in message
    assert "8" in message


# --- the compiler's warning


def test_the_compiler_warns_where_it_gathers_a_whole_array(capfd):
    """What no other law may cause is seen where it is due."""

    mesh = on(MESHES[0]).mesh
    here, there = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", None), (None, ("fsdp", "tensor"))))

    def move(x):
        x = jax.lax.with_sharding_constraint(2 * x, here)
        return 3 * jax.lax.with_sharding_constraint(x + 1, there)

    jax.jit(move)(jnp.ones((8, 8)))
    assert WARNING in capfd.readouterr().err


# --- decoding


@every_mode
def test_published_weights_come_to_where_they_live_and_go_back(mode, tmp_path):
    """Each device has its part alone, the parts are those of the whole, and what is written of them is the same."""
    folder = Path(__file__).parent / "fixtures" / ("t5" if mode == MODES[0] else "llama")
    partitioner = on("data=2,fsdp=2,tensor=2")
    for scan_layers in (False, True):
        config, whole = read_pretrained(folder, scan_layers=scan_layers)
        _, parts = read_pretrained(folder, partitioner, scan_layers=scan_layers)
        jax.tree.map(np.testing.assert_array_equal, parts, whole)
        assert jax.tree.map(lambda x: x.sharding, parts) == partitioner.shardings(parts)
        assert part_bytes(parts) < 0.4 * part_bytes(whole)
        for name, params in (("whole", whole), ("parts", parts)):
            write_pretrained(tmp_path / name, "t5" if mode == MODES[0] else "llama", config, params)
        found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    "mesh", ["data=2,fsdp=2,tensor=2", pytest.param("data=2,context=2,tensor=2", marks=pytest.mark.slow)]
)
@every_mode
def test_decoding_is_the_same_on_a_mesh(mode, mesh):
    """Greedily, by beams, with a draft and with weights in 8 bits: the tokens of one device, whose prompts differ in
    length; scores to 1e-9, and to 1e-5 where scales are float32."""
    config = exact("rope-gqa", mode, vocab_size=24)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables(variant("rope-gqa", mode))["params"])
    params = unflatten_dict(
        {path: np.resize(x, [24 if n == 23 else n for n in x.shape]) for path, x in flatten_dict(params).items()}
    )
    ids = np.random.default_rng(0).integers(1, 24, (4, 8))
    prompt = Tokens.from_ids(ids * (np.arange(8) >= [[0], [3], [6], [0]]), pad_id=0)
    source = Tokens.from_ids(ids[::-1] * (np.arange(8) < [[8], [5], [2], [8]]), pad_id=0) if mode == MODES[0] else None
    model, options = Transformer(config), dict(source=source, max_new_tokens=8, eos_id=[3, 7])
    for more in ({}, dict(beam_size=3, num_return=2), dict(draft=True), dict(int8=True)):
        found = []
        for partitioner in (on("jit"), on(mesh)):
            here = params if partitioner.mesh is None else jax.device_put(params, partitioner.shardings(params))
            given = more | ({"draft": (model, here)} if "draft" in more else {})
            if given.pop("int8", False):
                here = partitioner.made(int8_weights, here)
            with partitioner.scope():
                found.append(jax.tree.map(np.asarray, generate(model, here, prompt, **options, **given)))
        np.testing.assert_array_equal(found[0].ids, found[1].ids)
        np.testing.assert_array_equal(found[0].lengths, found[1].lengths)
        np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=0, atol=1e-5 if "int8" in more else 1e-9)


# --- the benchmark of them


@every_mode
def test_what_is_compared_makes_the_same_step(mode):
    """Each way to split a step that `bench strategies` has: the loss of the second one."""
    subject = Subject(exact("plain", mode), ROWS, 16)
    losses = {}
    for name, way in strategies.ways_over(DEVICES).items():
        step, costs = strategies.build(subject, way)
        step()
        losses[name] = float(np.ravel(step()["loss"])[0])
        assert (costs["exchanged_bytes"] > 0) == (name != strategies.ONE)
    assert len(losses) == 8
    for name, loss in losses.items():
        assert loss == pytest.approx(losses[strategies.ONE], rel=1e-12), name
