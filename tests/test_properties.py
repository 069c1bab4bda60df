"""Laws of any model: configs are drawn at random over all choices, and every law is checked on each of them.

What costs is to compile a config, so all laws share its gradient, its logits at another shape and, of some, its train
step. Nothing drops out here, as what does depends on the shape. Experts have room for all tokens of a row, since those
without a place depend on what else is in it; and in bfloat16 a token goes through all of them, since rounding decides
among experts that are nearly alike.
"""

import functools
import operator
import typing
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from variants import TINY, has_source, variables

from transformer_jax import Batch, ModelConfig, Tokens, TrainState, Transformer, make_loss, train_step
from transformer_jax.config import LossConfig, Mode, RopeConfig

ROWS, TARGET, SOURCE = 6, 12, 9
LENGTH, SOURCE_LENGTH = 5, 4  # of a document, two of which fit into a row
# tolerance of logits, whose standard deviation is about 1; a norm of small numbers makes more of what float32 rounds
LOGITS = {"float32": 1e-5, "float64": 1e-9, "bfloat16": 0.1}
SUMS = {"float32": 1e-5, "float64": 1e-5, "bfloat16": 0.02}  # of the loss and of routers, relative
GRADIENT = {"float32": 1e-5, "bfloat16": 0.05}  # of a gradient, relative to its largest entry


# --- configs


def choices(kind: type) -> dict[str, tuple]:
    """The values of each field that is a choice, as its type says (float64, which needs x64, and float8 are out)."""
    hints = {
        name: (False, True) if hint in (bool, bool | None) else hint
        for name, hint in typing.get_type_hints(kind).items()
    }
    values = {name: hint if isinstance(hint, tuple) else typing.get_args(hint) for name, hint in hints.items()}
    return {
        name: tuple(value for value in listed if value not in ("float64", "float8"))
        for name, listed in values.items()
        if all(isinstance(value, (bool, str)) for value in listed) and listed
    }


@st.composite
def configs(draw: Any, mode: Mode, dtype: str) -> ModelConfig:
    """A tiny model with any choices that go together."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    config: dict[str, Any] = {name: one_of(*values) for name, values in choices(ModelConfig).items()}
    config |= dict(mode=mode, dtype=dtype)
    rope = dict(base=one_of(500.0, 10_000.0), factor=one_of(1.0, 4.0), original_length=one_of(16, 8192))
    rope |= dict(fraction=one_of(0.5, 1.0), high=one_of(4.0, 32.0), scaling=one_of(*choices(RopeConfig)["scaling"]))
    if config["position"] not in ("rope", "alibi", "t5"):
        config["cross_position"] = "none"
    config["parallel_residual"] &= config["norm_placement"] != "post"

    heads, windows = one_of(1, 2, 3, 4), draw(st.lists(st.sampled_from([0, 0, 1, 2, 4]), min_size=1, max_size=2))
    layers = [2 * len(windows) if config["scan_layers"] else one_of(1, 1, 2) for _ in range(2)]
    config |= dict(
        vocab_size=TINY["vocab_size"], d_model=12, d_ff=one_of(8, 20), max_length=16, rope=RopeConfig(**rope)
    )
    config |= dict(num_layers=layers[0], num_encoder_layers=layers[1], windows=tuple(windows))
    config |= dict(num_heads=heads, num_kv_heads=one_of(*(n for n in (1, 2, 3, 4) if heads % n == 0)))
    config |= dict(head_dim=one_of(4, 8) if config["position"] == "rope" else one_of(None, 3, 8))
    config |= dict(relative_buckets=one_of(4, 8, 12), relative_max_distance=one_of(7, 20), norm_eps=one_of(1e-6, 1e-5))
    config |= dict(attention_softcap=one_of(None, 2.0), logits_softcap=one_of(None, 3.0))
    config |= dict(query_scale=one_of(None, 0.3, 1.0))

    experts = one_of(0, 0, 1, 2, 4)
    if experts:
        each = experts if dtype == "bfloat16" else one_of(*range(1, experts + 1))
        room = one_of(0.0, 1.0, 1.5) * experts / each
        config |= dict(
            num_experts=experts, experts_per_token=each, expert_capacity=room, num_shared_experts=one_of(0, 1)
        )
        config["normalize_gates"] &= each > 1 or experts == 1
    return ModelConfig(**config)


class Drawn(NamedTuple):
    """One example: a model, its loss, microbatches in a step, 0 for no step, and the seed of the documents."""

    config: ModelConfig
    loss: LossConfig
    accumulate: int
    seed: int


def examples(mode: Mode, dtype: str) -> st.SearchStrategy[Drawn]:
    weights = dict(label_smoothing=(0.0, 0.1), z_loss=(0.0, 1e-2), balance_loss=(0.0, 0.01), router_z_loss=(0.0, 0.001))
    loss = st.builds(LossConfig, **{name: st.sampled_from(values) for name, values in weights.items()})
    return st.builds(Drawn, configs(mode, dtype), loss, st.sampled_from([0, 0, 2, 3]), st.integers(0, 2**32 - 1))


# --- documents


class Document(NamedTuple):
    """A target with its labels and weights, and its source; `prefix` tokens of the target see each other."""

    ids_T: np.ndarray
    labels_T: np.ndarray
    weights_T: np.ndarray
    source_S: np.ndarray
    prefix: int


def document(random: np.random.Generator, length: int = LENGTH, source_length: int = SOURCE_LENGTH) -> Document:
    """A random one, in which some tokens do not count."""
    ids_T, labels_T = random.integers(0, TINY["vocab_size"], (2, length))
    weights_T = (random.random(length) < 0.7).astype(np.float32)
    weights_T[-1] = 1
    return Document(ids_T, labels_T, weights_T, random.integers(0, TINY["vocab_size"], source_length), prefix=2)


def changed(ids: np.ndarray, place: int) -> np.ndarray:
    """The same ids, but for one."""
    return np.where(np.arange(len(ids)) == place, (ids + 1) % TINY["vocab_size"], ids)


Placed = tuple[int, int, Document]  # where target and source start
AT_START, AT_END = (0, 0), (TARGET - LENGTH, SOURCE - SOURCE_LENGTH)


def batch_of(
    config: ModelConfig, random: np.random.Generator, *rows: list[Placed], shape=(ROWS, TARGET, SOURCE)
) -> Batch:
    """Rows of documents, and then empty ones. Padding has any ids, labels and positions; its weights are 0."""
    count, length, source_length = shape
    labels_BT, weights_BT = random.integers(0, TINY["vocab_size"], (count, length)), np.zeros((count, length))

    def padding(length: int) -> dict[str, np.ndarray]:
        ids, positions = (random.integers(0, most, (count, length)) for most in (TINY["vocab_size"], config.max_length))
        return dict(ids=ids, segments=0 * ids, positions=positions, prefix=random.random(ids.shape) < 0.5)

    def write(tokens: dict[str, np.ndarray], here: Any, ids: np.ndarray, segment: int, prefix: int) -> None:
        order = np.arange(len(ids))
        for name, values in dict(ids=ids, segments=segment, positions=order, prefix=order < prefix).items():
            tokens[name][here] = values

    def finished(tokens: dict[str, np.ndarray], prefix: bool) -> Tokens:
        numbers = {name: tokens[name].astype(np.int32) for name in ("ids", "segments", "positions")}
        return Tokens(**numbers, prefix=tokens["prefix"] if prefix else None)

    target, source = padding(length), padding(source_length)
    for row, documents in enumerate(rows):
        for segment, (place, source_place, one) in enumerate(documents, 1):
            here = row, slice(place, place + len(one.ids_T))
            write(target, here, one.ids_T, segment, one.prefix)
            labels_BT[here], weights_BT[here] = one.labels_T, one.weights_T
            write(source, (row, slice(source_place, source_place + len(one.source_S))), one.source_S, segment, 0)
    return Batch(
        finished(target, config.prefix_attention == "bidirectional"),
        labels_BT.astype(np.int32),
        weights_BT.astype(np.float32),
        finished(source, False) if has_source(config) else None,
    )


def at_places(logits_BTV: np.ndarray, *places: int) -> np.ndarray:
    """The logits of a document from its place in each of the first rows."""
    return np.stack([logits_BTV[row, place : place + LENGTH] for row, place in enumerate(places)])


# --- what is run


@functools.cache
def compiler_options() -> dict[str, Any]:
    """What makes compiling three times as fast, without the one option that not every JAX knows."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    try:
        faster = options | {"xla_cpu_use_fusion_emitters": False}
        jax.jit(operator.neg, compiler_options=faster)(1.0)
    except RuntimeError:
        return options
    return faster


def jit(function: Any) -> Any:
    return jax.jit(function, compiler_options=compiler_options())


def leaves(tree: Any) -> dict[tuple, Any]:
    """NumPy arrays by their paths."""
    return dict(flatten_dict(jax.tree.map(np.asarray, tree)))


class Case:
    """A model with random parameters, and its functions, compiled when they are first called."""

    def __init__(self, drawn: Drawn) -> None:
        config, self.config, self.loss = drawn.config, drawn.config, drawn.loss
        model, of_batch = Transformer(config), make_loss(Transformer(config), drawn.loss)
        self.params = jax.tree.map(jnp.asarray, variables(config)["params"])

        def logits(params: Any, batch: Batch) -> Any:
            return model.apply({"params": params}, batch.target, batch.source)

        def all_of(params: Any, batch: Batch) -> Any:
            return logits(params, batch), *jax.grad(of_batch, has_aux=True)(params, batch, None)

        self._logits, self._all_of = jit(logits), jit(all_of)
        self._step = jit(functools.partial(train_step, loss=of_batch, optimizer=KEEPING, accumulate=drawn.accumulate))

    def logits(self, batch: Batch) -> np.ndarray:
        """Of a batch of the one shape, [B, T, V]."""
        return np.asarray(self._all_of(self.params, batch)[0])

    def gradient(self, batch: Batch) -> tuple[dict[tuple, Any], dict[str, Any]]:
        """Sums over a batch of the one shape: the gradient by its paths, and the others."""
        _, gradient, sums = self._all_of(self.params, batch)
        return leaves(gradient), jax.tree.map(np.asarray, sums)

    def alone(self, one: Document) -> np.ndarray:
        """Logits of a document that is a batch by itself, without padding, [T, V]."""
        batch = batch_of(self.config, np.random.default_rng(0), [(*AT_START, one)], shape=(1, LENGTH, SOURCE_LENGTH))
        return np.asarray(self._logits(self.params, batch))[0]

    def step(self, batch: Batch) -> tuple[TrainState, TrainState, dict[str, np.ndarray]]:
        """The state before and after a train step, and its metrics."""
        state = TrainState.create(self.params, KEEPING, 0)
        after, metrics = self._step(state, batch)
        return state, after, jax.tree.map(np.asarray, metrics)

    def assert_close(self, got: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), rtol=0, atol=LOGITS[self.config.dtype])

    def assert_same(self, got: np.ndarray, wanted: np.ndarray) -> None:
        """To the last bit; of experts, who get a token in the order of all of them, within the tolerance."""
        self.assert_close(got, wanted)
        if not self.config.num_experts:
            np.testing.assert_array_equal(got, wanted)

    def assert_sums(self, got: tuple[dict, dict], wanted: tuple[dict, dict]) -> None:
        """Of gradient and loss; the tokens exactly, but in bfloat16 the hits too."""
        (gradient, sums), (wanted_gradient, wanted_sums) = got, wanted
        for name in wanted_sums.keys() - {"correct" if self.config.dtype == "bfloat16" else ""}:
            exact = name in ("tokens", "correct", "routed", "dropped")
            rtol = 0 if exact else SUMS[self.config.dtype]
            np.testing.assert_allclose(sums[name], wanted_sums[name], rtol=rtol, err_msg=name)
        self.assert_gradient(gradient, wanted_gradient)

    def assert_gradient(self, got: dict[tuple, np.ndarray], wanted: dict[tuple, np.ndarray]) -> None:
        coarse = "bfloat16" in (self.config.dtype, self.config.param_dtype)
        largest = max(np.abs(leaf.astype(np.float32)).max() for leaf in wanted.values())
        atol = GRADIENT["bfloat16" if coarse else "float32"] * largest
        for path, leaf in wanted.items():
            left, right = (x.astype(np.float32) for x in (got[path], leaf))
            np.testing.assert_allclose(left, right, rtol=0, atol=atol, err_msg=str(path))


# an optimizer whose state is the gradient
KEEPING = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(operator.neg, updates), updates),
)


# --- laws


def logits_are_whole(case: Case, random: np.random.Generator) -> None:
    """One number for each row, place and entry of the vocabulary, finite and with more digits than bfloat16 has."""
    rows = ([(*AT_START, document(random, TARGET, SOURCE))] for _ in range(ROWS))
    logits = case.logits(batch_of(case.config, random, *rows))
    assert logits.shape == (ROWS, TARGET, case.config.vocab_size)
    assert logits.dtype == jnp.promote_types(case.config.dtype, np.float32)
    assert np.isfinite(logits).all()
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9


def no_token_sees_a_later_one(case: Case, random: np.random.Generator) -> None:
    """Another token changes no logits before it, and changes its own; one of a prefix changes those before it, too."""
    rows = [document(random, TARGET, SOURCE) for _ in range(ROWS)]

    def logits(place: int | None) -> np.ndarray:
        ids = [one.ids_T if place is None else changed(one.ids_T, place) for one in rows]
        placed = [[(*AT_START, one._replace(ids_T=new))] for one, new in zip(rows, ids, strict=True)]
        return case.logits(batch_of(case.config, np.random.default_rng(0), *placed))

    before, place = logits(None), int(random.integers(2, TARGET))
    after = logits(place)
    case.assert_same(after[:, :place], before[:, :place])
    assert (after != before)[:, place].any(-1).all()
    after = logits(1)
    if case.config.prefix_attention == "causal":
        case.assert_same(after[:, 0], before[:, 0])
    elif any(window != 1 for window in case.config.windows[: case.config.num_layers]):
        assert (after != before)[:, 0].any()


def padding_changes_nothing(case: Case, random: np.random.Generator) -> None:
    """A document has the logits that it has alone, wherever padding is, in target and source, and whatever it holds."""
    one = document(random)
    places = [AT_START, AT_END, (3, 2), (1, SOURCE - SOURCE_LENGTH), (TARGET - LENGTH, 0), (6, 1)]
    batch = batch_of(case.config, random, *([(*place, one)] for place in places))
    case.assert_close(at_places(case.logits(batch), *(place for place, _ in places)), case.alone(one))


def documents_of_a_row_are_alone(case: Case, random: np.random.Generator) -> None:
    """Each has the logits that it has alone; neither its number nor another document beside it changes them."""
    one, *others = (document(random) for _ in range(4))
    after = [[(*AT_START, one), (*AT_END, other)] for other in others]
    before = [[(*AT_START, other), (*AT_END, one)] for other in others]
    logits = case.logits(batch_of(case.config, random, *after, *before))
    case.assert_close(at_places(logits, 0, 0, 0, *[AT_END[0]] * 3), case.alone(one))
    for row, other in enumerate(others):
        case.assert_close(logits[row, AT_END[0] :], case.alone(other))
    case.assert_same(logits[1:3, :LENGTH], logits[[0, 0], :LENGTH])
    case.assert_same(logits[4:6, AT_END[0] :], logits[[3, 3], AT_END[0] :])


def rows_are_alone(case: Case, random: np.random.Generator) -> None:
    """Rows in another order have the same logits in that order, sums and gradient; another row changes none of them."""
    rows = [[(*AT_START, document(random)), (*AT_END, document(random))] for _ in range(ROWS + 1)]
    order = random.permutation(ROWS)
    batch = batch_of(case.config, random, *rows[:ROWS])
    permuted = jax.tree.map(operator.itemgetter(order), batch)
    case.assert_close(case.logits(permuted), case.logits(batch)[order])
    case.assert_sums(case.gradient(permuted), case.gradient(batch))
    other = jax.tree.map(np.copy, batch)
    jax.tree.map(lambda to, x: operator.setitem(to, 2, x[0]), other, batch_of(case.config, random, rows[-1]))
    kept = np.arange(ROWS) != 2
    case.assert_same(case.logits(other)[kept], case.logits(batch)[kept])


def sums_of_rows_add_up(case: Case, random: np.random.Generator) -> None:
    """Sums and gradient of a batch are those of its rows, the others empty: an empty row adds nothing."""
    one, two, three = (document(random) for _ in range(3))
    rows = [[(*AT_START, one), (*AT_END, two)], [(3, 2, three)]]
    whole = case.gradient(batch_of(case.config, random, *rows, [(*AT_END, three)]))
    parts = [case.gradient(batch_of(case.config, random, *part)) for part in ([rows[0]], [[], rows[1]], [rows[1]])]
    case.assert_sums(whole, jax.tree.map(lambda *x: functools.reduce(operator.add, x), *parts))


def padding_has_no_loss(case: Case, random: np.random.Generator) -> None:
    """Sums and gradient of two documents are the same in one row and in two, with padding and labels anywhere."""
    one, two = document(random), document(random)
    wanted = case.gradient(batch_of(case.config, random, [(*AT_START, one)], [(*AT_START, two)]))
    case.assert_sums(case.gradient(batch_of(case.config, random, [], [(2, 3, two)], [], [(*AT_END, one)])), wanted)
    gradient, sums = case.gradient(batch_of(case.config, random, [(*AT_START, one), (*AT_END, two)]))
    if case.config.num_experts:  # balance is counted within a row
        sums["balance"] = wanted[1]["balance"]
        gradient = wanted[0] if case.loss.balance_loss else gradient
    case.assert_sums((gradient, sums), wanted)


def missing_sources_and_targets_are_finite(case: Case, random: np.random.Generator) -> None:
    """Rows without source or target have finite logits and gradients, see no padding instead, and change no others."""
    one, nothing = document(random), np.zeros(0, int)
    no_source = one._replace(source_S=nothing)
    no_target = one._replace(ids_T=nothing, labels_T=nothing, weights_T=nothing)
    rows = [(*AT_START, one)], [(*AT_START, no_source)], [(*AT_START, no_target)]
    batch, other = (batch_of(case.config, random, *rows) for _ in range(2))
    logits, (gradient, sums) = case.logits(batch), case.gradient(batch)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in (*gradient.values(), *sums.values()))
    assert sums["tokens"] == one.weights_T.sum() * 2
    case.assert_close(logits[0, :LENGTH], case.alone(one))
    case.assert_same(case.logits(other)[1, :LENGTH], logits[1, :LENGTH])
    case.assert_sums(case.gradient(other), (gradient, sums))


def a_batch_of_padding_is_nothing(case: Case, random: np.random.Generator) -> None:
    """Its sums and gradient are exactly 0, its logits finite."""
    batch = batch_of(case.config, random)
    assert np.isfinite(case.logits(batch)).all()
    gradient, sums = case.gradient(batch)
    assert not any(np.any(leaf) for leaf in (*gradient.values(), *sums.values()))


def a_step_of_padding_changes_nothing(case: Case, random: np.random.Generator) -> None:
    """All metrics are 0, and all of the state but the number of steps stays as it was, to the last bit."""
    batch = batch_of(case.config, random)
    before, after, metrics = case.step(batch)
    assert not any(np.any(value) for value in metrics.values())
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before.replace(step=before.step + 1)))


def microbatches_add_up_to_the_batch(case: Case, random: np.random.Generator) -> None:
    """Of rows with unequal numbers of tokens that count, none too: a train step has the gradient of the mean."""
    one, two, three, *rest = (document(random) for _ in range(6))
    few = three._replace(weights_T=np.eye(LENGTH, dtype=np.float32)[2])
    rows = [[(*AT_START, one), (*AT_END, two)], [(*AT_END, few)], [], *([(3, 2, each)] for each in rest)]
    batch = batch_of(case.config, random, *rows)
    gradient, sums = case.gradient(batch)
    _, after, metrics = case.step(batch)
    assert metrics["tokens"] == batch.weights.sum() > 0
    np.testing.assert_allclose(metrics["loss"], sums["loss"] / sums["tokens"], rtol=SUMS[case.config.dtype])
    mean = {path: leaf.astype(np.float32) / sums["tokens"] for path, leaf in gradient.items()}
    case.assert_gradient(leaves(after.opt_state), mean)


LAWS = (
    logits_are_whole,
    no_token_sees_a_later_one,
    padding_changes_nothing,
    documents_of_a_row_are_alone,
    rows_are_alone,
    sums_of_rows_add_up,
    padding_has_no_loss,
    missing_sources_and_targets_are_finite,
    a_batch_of_padding_is_nothing,
)
STEP_LAWS = (a_step_of_padding_changes_nothing, microbatches_add_up_to_the_batch)


def obey(mode: Mode, dtype: str, count: int) -> None:
    """Checks the laws on `count` models, the same in every run, the simplest first. Failures are simplified."""

    @seed(zlib.crc32(f"{mode} {dtype}".encode()))
    @settings(max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink))
    @given(drawn=examples(mode, dtype))
    def check(drawn: Drawn) -> None:
        case = Case(drawn)
        for law in (*LAWS, *(STEP_LAWS if drawn.accumulate else ())):
            law(case, np.random.default_rng(drawn.seed))

    with jax.enable_x64(dtype == "float64"):
        check()


every_mode = pytest.mark.parametrize("mode", typing.get_args(Mode))


@pytest.mark.long
@every_mode
def test_any_model_obeys_the_laws(mode):
    obey(mode, "float32", 3)


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_many_models_obey_the_laws(mode, dtype):
    obey(mode, dtype, 40)
