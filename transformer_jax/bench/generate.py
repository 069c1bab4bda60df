"""`transformer-jax bench generate`: decoding without a cache, with one, with the source's keys kept as well, and by
`transformers` where it is installed, at the same sizes with random weights.

Every way makes the same number of tokens and none ends early. The bound is what the memory allows: of each step the
bytes of parameters and cache that it has to read, at the rate that a product of a matrix and a vector reads here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.bench import peers
from transformer_jax.bench.measure import interleaved, ratio, read_bandwidth
from transformer_jax.config import ModelConfig
from transformer_jax.data.objectives import ARRANGEMENTS
from transformer_jax.decoding import generate
from transformer_jax.decoding.model import follow
from transformer_jax.model.cache import Room
from transformer_jax.model.int8 import int8_weights
from transformer_jax.model.transformer import Transformer
from transformer_jax.recipes import find_recipe
from transformer_jax.run import ONE_DEVICE, example_inputs
from transformer_jax.surroundings import surroundings
from transformer_jax.tokens import Tokens

Array = jax.Array

GPT2 = find_recipe("gpt2-124m").model.replace(max_length=1280, dtype="float32")
BART = ModelConfig(
    vocab_size=10_000,
    d_model=256,
    num_layers=3,
    num_heads=8,
    max_length=128,
    position="learned",
    norm_placement="post",
    embedding_norm=True,
    activation="gelu",
    norm_eps=1e-5,
    scale_embeddings=False,
)


class Case(NamedTuple):
    """What is decoded: `length` tokens of prompt or source, then `new` ones."""

    config: ModelConfig
    batch: int
    length: int
    new: int
    beam_size: int = 1
    uncached: bool = True  # it is also decoded without a cache
    peer: bool = True  # and by `transformers`, which has its like
    int8: bool = False  # and with weights in 8 bits


CASES = {
    "gpt2-batch-1": Case(GPT2, 1, 16, 128, int8=True),
    "gpt2-batch-8": Case(GPT2, 8, 16, 128, uncached=False),
    "gpt2-1024-tokens": Case(GPT2, 1, 16, 1024, uncached=False),
    "bart-greedy": Case(BART, 8, 32, 32),
    "bart-beam-4": Case(BART, 8, 32, 32, beam_size=4, uncached=False),
}


@functools.cache
def random_params(config: ModelConfig) -> Any:
    """Parameters as they are before training."""
    return ONE_DEVICE.init(Transformer(config).init, jax.random.key(0), *example_inputs(config))["params"]


@functools.partial(jax.jit, static_argnames=("model", "new"))
def without_cache(model: Transformer, params: Any, prompt: Tokens, source: Tokens | None, new: int) -> Array:
    """int32[B, new]: greedy decoding that reads all of the text again for each token."""
    P = prompt.ids.shape[1]
    ids_BT = jnp.pad(prompt.ids, [(0, 0), (0, new)])
    memory = model.apply({"params": params}, source, method="encode")

    def extend(place: Array, ids_BT: Array) -> Array:
        logits_BTV = model.apply({"params": params}, Tokens.from_ids(ids_BT[:, :-1]), memory, method="decode")[0]
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, place - 1, 1, keepdims=False)
        return ids_BT.at[:, place].set(logits_BV.argmax(-1).astype(jnp.int32))

    return jax.lax.fori_loop(P, P + new, extend, ids_BT)[:, P:]


@functools.partial(jax.jit, static_argnames=("model", "new"))
def without_source_keys(model: Transformer, params: Any, prompt: Tokens, source: Tokens, new: int) -> Array:
    """int32[B, new]: greedy decoding with a cache, where each step computes the source's keys and values again."""
    B, P = prompt.ids.shape
    x_BSD = model.apply({"params": params}, source, method="read")

    def keys(params: Any) -> Any:
        return model.apply({"params": params}, x_BSD, source, method="remember")

    def extend(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        ids_BN, cache = carry
        again = jax.lax.optimization_barrier((params, step))[0]  # else they are computed once before the loop
        id_B1 = jax.lax.dynamic_slice_in_dim(ids_BN, step - 1, 1, 1)
        logits_B1V, cache = follow(
            model, params, keys(again), cache, id_B1, jnp.full(B, P, jnp.int32) + step - 1, beams=False
        )
        return ids_BN.at[:, step].set(logits_B1V[:, 0].argmax(-1).astype(jnp.int32)), cache

    room = Room(P + new - 1)
    logits_B1V, cache = model.apply({"params": params}, prompt, keys(params), None, room, True, method="decode")
    ids_BN = jnp.zeros((B, new), jnp.int32).at[:, 0].set(logits_B1V[:, 0].argmax(-1).astype(jnp.int32))
    return jax.lax.fori_loop(1, new, extend, (ids_BN, cache))[0]


def ways(case: Case) -> dict[str, Callable[[], Any]]:
    """Functions that decode a case, by name; the last of ours is the one that `generate` is."""
    config, model, params = case.config, Transformer(case.config), random_params(case.config)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (case.batch, case.length)).astype(np.int32)
    if ARRANGEMENTS[config.mode].has_source:
        prompt, source = Tokens.from_ids(np.full((case.batch, 1), 2, np.int32)), Tokens.from_ids(ids)
        peer = peers.bart(config, ids, case.new, case.beam_size)
    else:
        prompt, source = Tokens.from_ids(ids), None
        peer = peers.gpt2(config, ids, case.new) if case.peer else None
    found: dict[str, Callable[[], Any]] = {}
    if case.uncached:
        found["no cache"] = lambda: without_cache(model, params, prompt, source, case.new)
        if source is not None:
            found["cache"] = lambda: without_source_keys(model, params, prompt, source, case.new)
    name = "cache" if source is None else "cache, source keys kept"
    options: Any = dict(source=source, max_new_tokens=case.new, beam_size=case.beam_size)
    if case.int8:
        packed = jax.jit(int8_weights)(params)
        found["cache, weights in 8 bits"] = lambda: generate(model, packed, prompt, **options).ids
    found[name] = lambda: generate(model, params, prompt, **options).ids
    return found | ({peers.NAME: peer} if peer is not None else {})


def step_bytes(case: Case) -> float:
    """Bytes that a step reads, the mean over the steps: parameters of the decoder, keys and values of all sequences.

    A row of the embedding table aside, every parameter is read once; the table is, as it gives the logits.
    """
    params, config = random_params(case.config), case.config
    weights = sum(x.nbytes for x in jax.tree.leaves({name: part for name, part in params.items() if name != "encoder"}))
    slots = case.length + case.new * case.beam_size / 2
    return (
        weights
        + 2
        * jnp.dtype(config.dtype).itemsize
        * case.batch
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * slots
    )


def measure(case: Case, repeats: int, bandwidth: float) -> dict[str, Any]:
    """The ways of a case, timed in turn."""
    times, tokens = interleaved(ways(case), repeats), case.batch * case.new
    ours = [name for name in times if name != peers.NAME][-1]
    bound = case.batch / (step_bytes(case) / bandwidth)
    rows = {
        name: {
            "tokens_per_second": tokens / each.median,
            "seconds": each.each,
            "spread": each.spread,
            "first_call_seconds": each.first,
            "ours_is_faster_by": ratio(times[ours], each),
        }
        for name, each in times.items()
    }
    return {
        **{name: getattr(case, name) for name in ("batch", "length", "new", "beam_size")},
        "mode": case.config.mode,
        "ways": rows,
        "bound_tokens_per_second": bound,
        "share_of_bound": tokens / times[ours].median / bound,
    }


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    bandwidth = read_bandwidth()
    result: dict[str, Any] = {"bench": "generate", **surroundings("transformers", "torch"), "repeats": repeats}
    result |= {"read_bytes_per_second": bandwidth, "cases": {}}
    for name in cases:
        say(name)
        result["cases"][name] = measure(CASES[name], repeats, bandwidth)
    by_length = [result["cases"].get(name) for name in ("gpt2-batch-1", "gpt2-1024-tokens")]
    if all(by_length):
        short, long = (np.median(case["ways"]["cache"]["seconds"]) for case in by_length)
        result["time_of_1024_tokens_over_128"] = float(long / short)
    return result


COLUMNS = ("case", "way", "tokens/s", "spread", "ours / it", "of the bound")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS, and what else is to be said of it."""
    found = []
    for name, case in result["cases"].items():
        last = [way for way in case["ways"] if way != peers.NAME][-1]
        for way, row in case["ways"].items():
            share = f"{case['share_of_bound']:.0%}" if way == last else ""
            rate = f"{row['tokens_per_second']:,.1f}"
            found.append((name, way, rate, f"{row['spread']:.0%}", f"{row['ours_is_faster_by']:.2f}", share))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    found = []
    if "time_of_1024_tokens_over_128" in result:
        found.append(f"1,024 tokens take {result['time_of_1024_tokens_over_128']:.2f} times as long as 128.")
    found.append(f"The device reads {result['read_bytes_per_second'] / 1e9:.1f} GB/s.")
    return found
