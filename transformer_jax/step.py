"""(state, batch) -> (state, metrics): one update, a pure function of its arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from transformer_jax.model.gradients import whole
from transformer_jax.objective import Loss
from transformer_jax.optimizer import global_norm
from transformer_jax.tokens import Batch

Array = jax.Array
Metrics = dict[str, Array]

NOT_FINITE, SPIKE = 1, 2  # why a step is left out
SPIKE_WINDOW = 128  # gradient norms that a spike is measured against,
SPIKE_LEAST = 16  # from so many on


class TrainState(struct.PyTreeNode):
    """All that changes as a run goes on.

    Attributes:
        step: int32, updates made so far.
        params: the parameters, a nested dict.
        opt_state: the optimizer's.
        seed: uint32, of dropout; keys are folded from it and the step, never stored.
        ema: moving average of the parameters, None where there is none.
        skipped: int32, steps that were left out because their numbers were not finite, or a spike.
        norms: float32[SPIKE_WINDOW], gradient norms of the latest steps, NaN where there is none yet; None without a
            guard against spikes.
        frozen: parameters that no step changes, None where there are none; see `tuning`.
    """

    step: Array
    params: Any
    opt_state: Any
    seed: Array
    ema: Any = None
    skipped: Any = None
    norms: Any = None
    frozen: Any = None

    @classmethod
    def create(
        cls,
        params: Any,
        optimizer: optax.GradientTransformation,
        seed: int,
        ema: bool = False,
        norms: bool = False,
        frozen: Any = None,
    ) -> "TrainState":
        """The state before the first step."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            seed=jnp.asarray(seed, jnp.uint32),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            skipped=jnp.zeros((), jnp.int32),
            norms=jnp.full(SPIKE_WINDOW, jnp.nan) if norms else None,
            frozen=frozen,
        )

    @property
    def best_params(self) -> Any:
        """What evaluation uses: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


class Updated(NamedTuple):
    """What an update changes of a state."""

    params: Any
    opt_state: Any
    ema: Any


def identity(tree: Any, *_: Any) -> Any:
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


def is_spike(norm: Array, norms: Array, factor: float) -> Array:
    """Whether a gradient norm is above `factor` times the median of the latest ones, [SPIKE_WINDOW], NaN for none."""
    known = jnp.count_nonzero(jnp.isfinite(norms)) >= SPIKE_LEAST
    return known & (norm > factor * jnp.nanmedian(norms))


def step_key(state: TrainState, part: Array | int = 0) -> Array:
    """The key of a step's randomness, for a part of its batch."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), part)


def apply_gradients(
    state: TrainState,
    grads: Any,
    sums: Metrics,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    spike_factor: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """The second half of `train_step`: the gradient and the other sums over a whole batch -> (state, metrics)."""
    tokens = jnp.maximum(sums["tokens"], 1)
    grads = jax.tree.map(lambda g: whole(g)[0], grads)  # made once for the norm and the update
    norm = global_norm(grads) / tokens
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
    norms, good = state.norms, finite
    if norms is not None:
        good &= ~is_spike(norm, norms, spike_factor)
        norms = jnp.where(jnp.isfinite(norm), jnp.roll(norms, 1).at[0].set(norm), norms)

    def mean(g: Array) -> Array:
        kind = jnp.promote_types(g.dtype, tokens.dtype)
        return (g * (1 / tokens.astype(kind))).astype(g.dtype)  # a product of a gradient is made where it is used

    def updated(old: Updated) -> Updated:
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(jax.tree.map(mean, grads), old.opt_state, old.params, grad_norm=norm)
        params, ema = optax.apply_updates(old.params, updates), old.ema
        if ema is not None:
            ema = jax.tree.map(lambda x, new: ema_decay * x + (1 - ema_decay) * new.astype(x.dtype), ema, params)
        return Updated(params, opt_state, ema)

    # a branch rather than a choice between old and new, for which XLA would copy the old on CPU
    new = jax.lax.cond(good, updated, identity, Updated(state.params, state.opt_state, state.ema))
    metrics = {
        "loss": sums["loss"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "tokens": sums["tokens"],
        "grad_norm": norm,
        "skipped": jnp.where(good, 0, jnp.where(finite, SPIKE, NOT_FINITE)),
    }
    for name in ("balance", "router_z", "dropped"):
        if name in sums:
            metrics[name] = sums[name] / jnp.maximum(sums["routed"], 1)
    return state.replace(step=state.step + 1, skipped=state.skipped + ~good, norms=norms, **new._asdict()), metrics


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    spike_factor: float = 0.0,
    reduce: Callable[[Any], Any] = identity,
    part: Array | int = 0,
    join: Callable[[Any, Any], Any] = identity,
) -> tuple[TrainState, Metrics]:
    """One update. Everything is a sum until one division by the number of tokens.

    A step whose loss or gradient is not finite, or whose gradient is a spike, is left out: `step` goes on, so the next
    batch is another one, and all else stays as it was. All devices decide from the same sums, before the update, so
    that it goes through the parameters once.

    Args:
        state: it is not changed; a compiled step may reuse its memory.
        batch: every array has the batch as its first axis, a multiple of `accumulate`.
        loss: see `objective.make_loss`.
        optimizer: any Optax optimizer. One that takes extra arguments is given `grad_norm`.
        accumulate: the number of microbatches, whose sums are those of the whole batch.
        ema_decay: of the moving average, where the state has one.
        spike_factor: leave a step out whose gradient norm is above so many times the median of the latest ones, where
            the state has those.
        reduce: adds a tree of sums over devices, where a device sees a part of the batch only.
        part: which part it sees, so that no two drop out alike.
        join: (params, frozen) of the state -> the model's parameters.

    Returns:
        The next state, and `loss`, `accuracy`, `tokens`, `grad_norm` of this step, before clipping, and `skipped`,
        why it was left out, 0 where it was not; of a mixture of experts also `balance` (1 is even), `router_z` and
        `dropped` (the share of choices that found no place), means over tokens and layers.
    """

    def joined(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Metrics]:
        return loss(join(params, state.frozen), batch, key)

    grads, sums = reduce(gradient_sums(joined, state.params, batch, step_key(state, part), accumulate))
    return apply_gradients(state, grads, sums, optimizer=optimizer, ema_decay=ema_decay, spike_factor=spike_factor)
