"""Batch and logits -> sums of loss, tokens and hits. Nothing is divided: sums add up over devices and microbatches."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from transformer_jax.axes import path_names
from transformer_jax.config import LossConfig
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Batch

Array = jax.Array
Sums = dict[str, Array]
Loss = Callable[[Any, Batch, Array | None], tuple[Array, Sums]]


def cross_entropy(logits_BTV: Array, labels_BT: Array, config: LossConfig) -> Array:
    """The loss of each token in nats, [B, T], with label smoothing (Szegedy et al. 2016, section 7) and z-loss.

    Smoothing mixes the label with the uniform distribution over the whole vocabulary.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, -1)
    label_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], -1)[..., 0]
    loss_BT = log_z_BT - label_BT
    if config.label_smoothing:
        even_BT = log_z_BT - jnp.mean(logits_BTV, -1)
        loss_BT = (1 - config.label_smoothing) * loss_BT + config.label_smoothing * even_BT
    return loss_BT + config.z_loss * jnp.square(log_z_BT) if config.z_loss else loss_BT


def token_sums(logits_BTV: Array, batch: Batch, config: LossConfig) -> Sums:
    """Sums over the tokens that count: `loss` in nats, `tokens`, and `correct` for those the model ranks first."""
    loss_BT = cross_entropy(logits_BTV, jnp.asarray(batch.labels), config)
    # the largest logit rather than argmax, which XLA does not vectorise on CPU; a tie counts as correct
    label_BT = jnp.take_along_axis(logits_BTV, jnp.asarray(batch.labels)[..., None], -1)[..., 0]
    correct_BT = label_BT >= logits_BTV.max(-1)
    # where, not times: padding must not pass on a NaN
    counts_BT = jnp.asarray(batch.weights) > 0
    return {
        "loss": jnp.sum(jnp.where(counts_BT, loss_BT * batch.weights, 0)),
        "tokens": jnp.sum(batch.weights),
        "correct": jnp.sum(correct_BT * batch.weights),
    }


def added_by_name(sown: Any) -> Sums:
    """What modules have sown, added up over all modules and layers by its name."""
    sums: Sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        name = [part for part in path_names(path) if not part.isdigit()][-1]
        sums[name] = sums.get(name, 0) + jnp.sum(leaf)
    return sums


def make_loss(model: Transformer, config: LossConfig) -> Loss:
    """(params, batch, dropout key or None) -> (what to differentiate, sums): a function of its arguments alone.

    The sums are those of `token_sums` and, of a mixture of experts, those of its routers, over tokens and layers.
    """

    def loss(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
        rngs = None if key is None else {"dropout": key}
        logits_BTV, sown = cast(
            tuple[Array, Any],
            model.apply({"params": params}, batch.target, batch.source, rngs=rngs, mutable=["sums"]),
        )
        sums = token_sums(logits_BTV, batch, config) | added_by_name(sown)
        routers = config.balance_loss * sums.get("balance", 0) + config.router_z_loss * sums.get("router_z", 0)
        return sums["loss"] + routers, sums

    return loss
