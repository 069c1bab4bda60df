"""OptimizerConfig -> an Optax optimizer and its schedule. Parameters are told apart by the names that they end in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from transformer_jax.axes import letters_of, map_named
from transformer_jax.config import OptimizerConfig

Tree = Any


def decays(params: Tree) -> Tree:
    """True for the weights of linear maps (`w_...`), False for norms, biases, embeddings and position tables."""
    return map_named(lambda names, _: names[-1].startswith("w_"), params)


def describe_decay(params: Tree, config: OptimizerConfig) -> str:
    """One line that says what decays and what does not."""
    flags = jax.tree.leaves(decays(params))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    decayed = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
    return (
        f"weight decay {config.weight_decay:g} on {sum(flags)} arrays named w_* ({decayed:,} parameters); none on "
        f"{len(flags) - sum(flags)} scale_*, bias_*, b_*, table_*, position_*, lora_* ({sum(sizes) - decayed:,})"
    )


def _inverse_sqrt(config: OptimizerConfig, steps: int, warmup: int) -> optax.Schedule:
    shift = max(warmup, 1)
    return lambda step: config.learning_rate * jnp.sqrt(shift / (jnp.maximum(step, 0) + 1 + warmup))


def _wsd(config: OptimizerConfig, steps: int, warmup: int) -> optax.Schedule:
    peak, decay = config.learning_rate, int(config.decay_fraction * (steps + warmup))
    stable = max(steps - decay, 0)
    fall = optax.linear_schedule(peak, peak * config.final_fraction, max(steps - stable, 1))
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])


# name: (config, steps after the warm-up, steps of warm-up) -> learning rate by steps after the warm-up
SCHEDULES: dict[str, Callable[[OptimizerConfig, int, int], optax.Schedule]] = {
    "constant": lambda config, steps, warmup: optax.constant_schedule(config.learning_rate),
    "linear": lambda config, steps, warmup: optax.linear_schedule(
        config.learning_rate, config.learning_rate * config.final_fraction, steps
    ),
    "cosine": lambda config, steps, warmup: optax.cosine_decay_schedule(
        config.learning_rate, steps, config.final_fraction
    ),
    "inverse-sqrt": _inverse_sqrt,
    "wsd": _wsd,
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up to the peak, then what `schedule` says until `steps`.

    The first step's rate is peak / warm-up, not 0, which would waste it.
    """
    warmup = steps // 10 if config.warmup_steps is None else config.warmup_steps
    after = SCHEDULES[config.schedule](config, max(steps - warmup, 1), warmup)
    rise = lambda step: config.learning_rate * (step + 1) / max(warmup, 1)  # noqa: E731
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def _is_inner_matrix(names: list[str]) -> bool:
    """A linear map within a block: muon's; the output layer and the rest are left to AdamW, as in Jordan 2024."""
    return names[-1].startswith("w_") and names[0] != "output"


def _muon_axes(params: Tree) -> Tree:
    """Which axes of a weight are its matrix's rows and columns: D is one side, the other letters the other.

    Layers that are stacked, and experts, are matrices of their own.
    """

    def axes(names: list[str], leaf: Any) -> contrib.MuonDimensionNumbers:
        letters = letters_of(names, leaf.ndim)
        width = letters.index("D")
        others = tuple(i for i, letter in enumerate(letters) if letter not in "DNE" or (letters.endswith("DE") and i))
        return contrib.MuonDimensionNumbers(*(((width,), others) if width < others[0] else (others, (width,))))

    return map_named(axes, params)


def _momentum(config: OptimizerConfig) -> Any:
    """The first moment's dtype, None for the parameters' own."""
    return None if config.momentum_dtype == "parameters" else jnp.dtype(config.momentum_dtype)


def _adamw(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    decay: Any = dict(weight_decay=config.weight_decay, mask=decays)
    return optax.adamw(rate, config.b1, config.b2, config.eps, mu_dtype=_momentum(config), **decay)


def _adafactor(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    # Optax adds this decay after the learning rate, once a step; times the peak it is of the size of the others
    decay = config.weight_decay * config.learning_rate or None
    return optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay, weight_decay_mask=decays)


def _lion(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, config.b1, config.b2, _momentum(config), config.weight_decay, decays)


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    muon = contrib.muon(
        rate,
        beta=config.b1,
        mu_dtype=_momentum(config),
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,  # updates as large as AdamW's, so one learning rate serves both (Liu et al. 2025, 2.2)
    )

    def owners(params: Tree) -> Tree:
        return map_named(lambda names, _: "muon" if _is_inner_matrix(names) else "adamw", params)

    return optax.partition({"muon": muon, "adamw": _adamw(config, rate)}, owners)


def _sgd(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    momentum = optax.trace(config.b1, accumulator_dtype=_momentum(config)) if config.b1 else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, decays)
    return optax.chain(momentum, decay, optax.scale_by_learning_rate(rate))


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def global_norm(tree: Tree) -> jax.Array:
    """The square root of the sum of all squares, at least float32.

    Written as products, which read each array once; on CPU a sum of squares would be written down before it is summed.
    """

    def squares(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim))
        kind = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), preferred_element_type=kind)

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(tree)), jnp.zeros(())))


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Shortens the gradient to a global norm; a norm that is known already is taken as `grad_norm`."""

    def update(updates: Tree, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Tree, Any]:
        norm = global_norm(updates) if grad_norm is None else grad_norm
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps: gradients are clipped by their global norm, then the update is made."""
    update = OPTIMIZERS[config.name](config, make_schedule(config, steps))
    return optax.chain(_clip(config.clip_norm), update) if config.clip_norm else update
