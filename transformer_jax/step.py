"""(state, batch) -> (state, metrics): one update, a pure function of its arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from transformer_jax.objective import Loss
from transformer_jax.tokens import Batch

Array = jax.Array
Metrics = dict[str, Array]


class TrainState(struct.PyTreeNode):
    """All that changes as a run goes on.

    Attributes:
        step: int32, updates made so far.
        params: the parameters, a nested dict.
        opt_state: the optimizer's.
        seed: uint32, of dropout; keys are folded from it and the step, never stored.
        ema: moving average of the parameters, None where there is none.
    """

    step: Array
    params: Any
    opt_state: Any
    seed: Array
    ema: Any = None

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, seed: int, ema: bool = False) -> "TrainState":
        """The state before the first step."""
        average = jax.tree.map(jnp.copy, params) if ema else None
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.asarray(seed, jnp.uint32), average)

    @property
    def best_params(self) -> Any:
        """What evaluation uses: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def identity(tree: Any) -> Any:
    return tree


def _microbatches(batch: Batch, count: int) -> Batch:
    """A leading axis of `count` parts. Each part takes every count-th row, so that it lies on all devices alike."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)


def gradient_sums(loss: Loss, params: Any, batch: Batch, key: Array, accumulate: int) -> tuple[Any, Metrics]:
    """Sums over the batch, gradients first, taken one microbatch after the other."""
    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, batch, key)

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        number, microbatch = part
        return jax.tree.map(jnp.add, total, grad(params, microbatch, jax.random.fold_in(key, number))), None

    parts = _microbatches(batch, accumulate)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))[0]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    reduce: Callable[[Any], Any] = identity,
    part: Array | int = 0,
) -> tuple[TrainState, Metrics]:
    """One update. Everything is a sum until one division by the number of tokens.

    Args:
        state: it is not changed; a compiled step may reuse its memory.
        batch: every array has the batch as its first axis, a multiple of `accumulate`.
        loss: see `objective.make_loss`.
        optimizer: any Optax optimizer.
        accumulate: the number of microbatches, whose sums are those of the whole batch.
        ema_decay: of the moving average, where the state has one.
        reduce: adds a tree of sums over devices, where a device sees a part of the batch only.
        part: which part it sees, so that no two drop out alike.

    Returns:
        The next state, and `loss`, `accuracy`, `tokens` and `grad_norm` of this step, before clipping; of a mixture of
        experts also `balance` (1 is even), `router_z` and `dropped` (the share of choices that found no place), means
        over tokens and layers.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), part)
    grads, sums = reduce(gradient_sums(loss, state.params, batch, key, accumulate))
    tokens = jnp.maximum(sums["tokens"], 1)
    grads = jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda mean, new: ema_decay * mean + (1 - ema_decay) * new.astype(mean.dtype), ema, params)
    metrics = {
        "loss": sums["loss"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "tokens": sums["tokens"],
        "grad_norm": optax.tree.norm(grads),
    }
    for name in ("balance", "router_z", "dropped"):
        if name in sums:
            metrics[name] = sums[name] / jnp.maximum(sums["routed"], 1)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics
