"""Batch and logits -> sums of loss, tokens and hits. Nothing is divided: sums add up over devices and microbatches."""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from transformer_jax.axes import axes_of, gathered, mesh_in_use, path_names, spec, split, varying
from transformer_jax.config import LossConfig
from transformer_jax.model.backends import soft_cap
from transformer_jax.model.gradients import matmul, picked, sum_of_parts
from transformer_jax.model.transformer import Head, Transformer
from transformer_jax.tokens import Batch

Array = jax.Array
Sums = dict[str, Array]
Loss = Callable[[Any, Batch, Array | None], tuple[Array, Sums]]


def cross_entropy(logits_V: Array, labels: Array, config: LossConfig, over: tuple[str, ...] = ()) -> Array:
    """The loss of each token in nats, [...], with label smoothing (Szegedy et al. 2016, section 7) and z-loss.

    Smoothing mixes the label with the uniform distribution over the whole vocabulary.

    Args:
        logits_V: [..., V].
        labels: int32[...].
        config: what is added.
        over: mesh axes, within a `shard_map`, over which the vocabulary is split.
    """
    return _loss_and_hit(logits_V, labels, config, over)[0]


def _loss_and_hit(
    logits_V: Array, labels: Array, config: LossConfig, over: tuple[str, ...] = ()
) -> tuple[Array, Array]:
    """The loss of each token, and whether the model ranks its label first, each [...]."""
    if over:
        labels = labels - jax.lax.axis_index(over) * logits_V.shape[-1]
    # the largest logit rather than argmax, which XLA does not vectorise on CPU; a tie counts as correct
    top = jax.lax.stop_gradient(logits_V).max(-1)
    top = jax.lax.pmax(top, over) if over else top
    safe = jnp.where(jnp.isfinite(top), top, 0)  # a stray infinity must not turn into a NaN of the difference
    log_z = jnp.log(_added(jnp.exp(logits_V - safe[..., None]).sum(-1), over)) + safe
    label = _added(picked(logits_V, labels), over)
    loss = log_z - label
    if config.label_smoothing:
        even = log_z - _added(jnp.sum(logits_V, -1), over) / (logits_V.shape[-1] * _devices(over))
        loss = (1 - config.label_smoothing) * loss + config.label_smoothing * even
    return loss + config.z_loss * jnp.square(log_z) if config.z_loss else loss, label >= top


def _added(x: Array, over: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, over) if over else x


def _devices(over: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in over)


def token_sums(logits_V: Array, labels: Array, weights: Array, config: LossConfig, over: tuple[str, ...] = ()) -> Sums:
    """Sums over the tokens that count: `loss` in nats, `tokens`, and `correct` for those the model ranks first.

    See `cross_entropy`; `weights` are float32[...], 0 for tokens that do not count.
    """
    loss, hit = _loss_and_hit(logits_V, labels, config, over)
    # where, not times: padding must not pass on a NaN
    return {
        "loss": jnp.sum(jnp.where(weights > 0, loss * weights, 0)),
        "tokens": jnp.sum(weights),
        "correct": jnp.sum(hit * weights),
    }


# The weight's gradient is added to for each part, which few tokens do not keep the units of an accelerator busy with.
CPU_MIB, ACCELERATOR_MIB = 128, 1024


def parts_of(tokens: int, vocab_size: int, mib: int | None) -> int:
    """How many parts the tokens of a device are taken in, so that a part's float32 logits fit; one if `mib` is 0."""
    if mib is None:
        mib = CPU_MIB if jax.default_backend() == "cpu" else ACCELERATOR_MIB
    return min(max(1, -(-tokens * vocab_size * 4 // (mib * 2**20))), tokens) if mib else 1


def head_sums(x_BTD: Array, head: Head, batch: Batch, cap: float | None, config: LossConfig) -> Sums:
    """`token_sums` of features and the output layer, a part of the tokens at a time.

    On a mesh each device takes its own tokens and its part of the vocabulary.
    """
    w_axes, mesh = head.einsum.partition(",")[2].partition("->")[0], mesh_in_use()
    x_split = split(dict(zip("BTD", x_BTD.shape, strict=True)), mesh)
    lengths = dict(zip(w_axes, head.w.shape, strict=True))
    have, want = split(lengths, mesh), split(lengths, mesh, x_split)
    over, summed = want.get("V", ()), want.get("D", ())

    def part(x_ND: Array, head: Head, rest: tuple[Array, Array]) -> tuple[Array, Sums]:
        kind = jnp.promote_types(x_ND.dtype, jnp.float32)
        logits_NV = _added(matmul(f"ND,{w_axes}->NV", x_ND, head.w, kind), summed)
        if head.b_V is not None:
            logits_NV += head.b_V.astype(kind)
        sums = token_sums(soft_cap(logits_NV, cap), *rest, config, over)
        return sums.pop("loss"), sums

    def local(x_BTD: Array, head: Head, labels_BT: Array, weights_BT: Array) -> Sums:
        if mesh:
            x_over = axes_of(x_split, "BTD")
            head = jax.tree.map(
                lambda a, axes: gathered(varying(a, x_over, axes_of(have, axes)), axes, have, want), head, letters
            )
            x_BTD = varying(x_BTD, axes_of(want, w_axes), x_over)
        x_ND, tokens = x_BTD.reshape(-1, x_BTD.shape[-1]), labels_BT.size
        parts = parts_of(tokens, head.w.shape[w_axes.index("V")], config.logits_mib)
        arrays = (x_ND, labels_BT.reshape(-1), weights_BT.reshape(-1))
        if tokens % parts:  # tokens without weight fill the last part
            arrays = tuple(jnp.pad(a, [(0, -tokens % parts), *[(0, 0)] * (a.ndim - 1)]) for a in arrays)
        loss, others = cast(tuple[Array, Sums], sum_of_parts(part, parts, arrays[0], head, arrays[1:]))
        sums = {"loss": loss} | others
        return jax.lax.psum(sums, axes_of(x_split, "BT")) if mesh else sums

    head = head.replace(w=head.w.astype(x_BTD.dtype))
    letters = head.replace(w=w_axes, b_V=None if head.b_V is None else "V")
    inputs = (x_BTD, head, jnp.asarray(batch.labels), jnp.asarray(batch.weights))
    if not mesh:
        return local(*inputs)
    head_specs = jax.tree.map(lambda axes: spec(axes, have), letters)
    specs = (spec("BTD", x_split), head_specs, spec("BT", x_split), spec("BT", x_split))
    return jax.shard_map(local, in_specs=specs, out_specs=spec("", {}))(*inputs)


def added_by_name(sown: Any) -> Sums:
    """What modules have sown, added up over all modules and layers by its name."""
    sums: Sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        name = [part for part in path_names(path) if not part.isdigit()][-1]
        sums[name] = sums.get(name, 0) + jnp.sum(leaf)
    return sums


def make_loss(model: Transformer, config: LossConfig = LossConfig()) -> Loss:  # noqa: B008 - it is frozen
    """(params, batch, dropout key or None) -> (what to differentiate, sums): a function of its arguments alone.

    The sums are those of `token_sums` and, of a mixture of experts, those of its routers, over tokens and layers.
    """

    def loss(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
        rngs = None if key is None else {"dropout": key}
        variables, cap = {"params": params}, model.config.logits_softcap
        (x_BTD, head), sown = cast(
            tuple[Any, Any],
            model.apply(variables, batch.target, batch.source, rngs=rngs, mutable=["sums"], method="before_logits"),
        )
        sums = head_sums(x_BTD, head, batch, cap, config) | added_by_name(sown)
        routers = config.balance_loss * sums.get("balance", 0) + config.router_z_loss * sums.get("router_z", 0)
        return sums["loss"] + routers, sums

    return loss
