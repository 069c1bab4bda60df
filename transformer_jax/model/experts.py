"""Mixture of experts: a router sends each token through a few of many feed-forward layers.

A row of tokens is a group (Lepikhin et al. 2021, section 3.2): capacity and balance are counted within it, so they are
the same on any number of devices and with any number of microbatches.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from transformer_jax.axes import axes_of, constrain, gathered, mesh_in_use, spec, split, varying
from transformer_jax.config import ModelConfig
from transformer_jax.model.layers import ACTIVATIONS, Einsum, FeedForward, linear, project

Array = jax.Array


class Routes(NamedTuple):
    """The experts of each token: `chosen_BTk`, int32, and `gate_BTk`, the weight of what each gives; 0 for padding."""

    chosen_BTk: Array
    gate_BTk: Array


def route(logits_BTE: Array, real_BT: Array, config: ModelConfig) -> tuple[Routes, dict[str, Array]]:
    """The likeliest experts of each token, and sums over tokens that keep routers healthy.

    The sums: `balance` (Fedus et al. 2022, equation 4), 1 for each token where a row's tokens are spread evenly;
    `router_z`, log(Z)^2 (Zoph et al. 2022, equation 5); `routed`, the tokens.
    """
    probability_BTE = jnp.where(real_BT[..., None], jax.nn.softmax(logits_BTE), 0)
    gate_BTk, chosen_BTk = jax.lax.top_k(probability_BTE, config.experts_per_token)
    if config.normalize_gates:
        gate_BTk /= jnp.where(real_BT[..., None], gate_BTk.sum(-1, keepdims=True), 1)
    hits_BTE = jax.nn.one_hot(chosen_BTk, config.num_experts).sum(-2) * real_BT[..., None]
    tokens_B1 = jnp.maximum(real_BT.sum(-1, keepdims=True), 1)
    share_BE = hits_BTE.sum(1) / (tokens_B1 * config.experts_per_token)
    sums = {
        "balance": config.num_experts * jnp.sum(share_BE * probability_BTE.sum(1)),
        "router_z": jnp.sum(jnp.where(real_BT, jnp.square(jax.nn.logsumexp(logits_BTE, -1)), 0)),
        "routed": jnp.sum(real_BT).astype(logits_BTE.dtype),
    }
    return Routes(chosen_BTk, gate_BTk), sums


def capacity(length: int, config: ModelConfig) -> int:
    """Places that an expert has for a row of so many tokens."""
    even = length * config.experts_per_token / config.num_experts
    return min(max(math.ceil(even * config.expert_capacity), 1), length)


def places(chosen_BTk: Array, real_BT: Array, experts: int, limit: int) -> Array:
    """int32[B, T, k], the place of each token among the E * C of its row; E * C where its expert is full.

    First choices go before second ones, earlier tokens before later ones (Lepikhin et al. 2021, algorithm 1).
    """
    B, T, k = chosen_BTk.shape
    queue_BQ = jnp.swapaxes(chosen_BTk, 1, 2).reshape(B, k * T)
    waiting_BQE = jax.nn.one_hot(queue_BQ, experts, dtype=jnp.int32) * jnp.tile(real_BT, (1, k))[..., None]
    number_BQ = jnp.take_along_axis(jnp.cumsum(waiting_BQE, 1) - 1, queue_BQ[..., None], -1)[..., 0]
    fits_BQ = (number_BQ < limit) & jnp.tile(real_BT, (1, k))
    place_BQ = jnp.where(fits_BQ, queue_BQ * limit + number_BQ, experts * limit)
    return jnp.swapaxes(place_BQ.reshape(B, k, T), 1, 2)


class Experts(nn.Module):
    """`num_experts` feed-forward layers, of which each token goes through `experts_per_token` and all shared ones."""

    config: ModelConfig

    def setup(self) -> None:
        config, bias = self.config, self.config.use_bias
        self.router = Einsum("BTD,DE->BTE", config)
        self.up = Einsum("BECD,EDF->BECF", config, bias)
        if config.gated:
            self.gate = Einsum("BECD,EDF->BECF", config, bias)
        self.down = Einsum("BECF,EFD->BECD", config, bias)
        if config.num_shared_experts:
            self.shared = FeedForward(config.replace(d_ff=config.num_shared_experts * config.d_ff))

    def __call__(self, x_BTD: Array, real_BT: Array, apart: bool = False) -> Array:
        """The experts' answers, [B, T, D]; `real_BT` says what is no padding, which takes no expert's place.

        Tokens that are `apart`, as in decoding, do not compete for places.
        """
        config, shape = self.config, x_BTD.shape
        if apart and config.expert_capacity:
            x_BTD, real_BT = x_BTD.reshape(-1, 1, shape[-1]), real_BT.reshape(-1, 1)
        kind = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTE = constrain(linear(x_BTD.astype(kind), (self.router.spec, self.router.w))[0], "BT.")
        routes, sums = route(logits_BTE, real_BT, config)
        answer = self._limited if config.expert_capacity else self._unlimited
        y_BTD, sums["dropped"] = answer(x_BTD, real_BT, routes)
        if not self.is_initializing():
            for name, value in sums.items():
                self.sow("sums", name, value)
        return (y_BTD + self.shared(x_BTD, real_BT) if config.num_shared_experts else y_BTD).reshape(shape)

    def _limited(self, x_BTD: Array, real_BT: Array, routes: Routes) -> tuple[Array, Array]:
        """Every expert answers for so many places a row (GShard); choices that find none are passed by."""
        (B, T, D), E = x_BTD.shape, self.config.num_experts
        C = capacity(T, self.config)
        place_BTk = places(routes.chosen_BTk, real_BT, E, C)
        rows = jnp.arange(B)[:, None, None]
        token_BP = jnp.full((B, E * C), T).at[rows, place_BTk].set(jnp.arange(T)[:, None], mode="drop")
        x_BPD = jnp.take_along_axis(x_BTD, token_BP[..., None], 1, mode="fill", fill_value=0)
        x_BECD = constrain(x_BPD.reshape(B, E, C, D), "BECD")
        h_BECF, *gate = project(x_BECD, self.up, *([self.gate] if self.config.gated else []))
        y_BPD = self.down(self._activated(h_BECF, gate)).reshape(B, E * C, D)
        y_BPD = constrain(y_BPD, "B..")
        chosen_BTkD = jnp.take_along_axis(y_BPD, place_BTk.reshape(B, -1, 1), 1, mode="fill", fill_value=0).reshape(
            *place_BTk.shape, D
        )
        dropped = jnp.sum((place_BTk == E * C) & real_BT[..., None]) / self.config.experts_per_token
        return jnp.einsum("BTk,BTkD->BTD", routes.gate_BTk.astype(y_BPD.dtype), chosen_BTkD), dropped

    def _activated(self, h: Array, gate: list[Array]) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        return h * activation(gate[0]) if gate else activation(h)

    def _unlimited(self, x_BTD: Array, real_BT: Array, routes: Routes) -> tuple[Array, Array]:
        """No token is dropped: tokens are sorted by expert and multiplied group by group (Gale et al. 2023, section 4).

        Devices that share the experts gather each other's tokens, answer for their own experts, and add up.
        """
        maps = [self.up, *([self.gate] if self.config.gated else []), self.down]
        weights = [each.w.astype(x_BTD.dtype) for each in maps]
        biases = [each.b.astype(x_BTD.dtype) for each in maps[:-1] if each.bias]
        y_BTD = on_devices(self._grouped, x_BTD, routes, weights, biases)
        if self.down.bias:
            hits_BTkE = jax.nn.one_hot(routes.chosen_BTk, self.config.num_experts, dtype=y_BTD.dtype)
            gate_BTE = jnp.einsum("BTk,BTkE->BTE", routes.gate_BTk.astype(y_BTD.dtype), hits_BTkE)
            y_BTD += linear(gate_BTE, ("BTE,ED->BTD", self.down.b))[0]
        return y_BTD, jnp.zeros((), routes.gate_BTk.dtype)

    def _grouped(self, x_BTD: Array, routes: Routes, weights: list[Array], biases: list[Array]) -> Array:
        """The sum over those experts whose weights these are, which `routes` counts from the first of them."""
        k, E = routes.chosen_BTk.shape[-1], weights[0].shape[0]
        x_ND, chosen_M = x_BTD.reshape(-1, x_BTD.shape[-1]), routes.chosen_BTk.reshape(-1)
        chosen_M = jnp.where((chosen_M >= 0) & (chosen_M < E), chosen_M, E)
        order_M = jnp.argsort(chosen_M, stable=True)
        expert_M, token_M = chosen_M[order_M], order_M // k
        tokens_E = jnp.bincount(expert_M, length=E + 1)[:E].astype(jnp.int32)
        x_MD = x_ND[token_M]
        h, *gate = (jax.lax.ragged_dot(x_MD, w_EDF, tokens_E) for w_EDF in weights[:-1])
        if biases:
            h, *gate = (y + b_EF[jnp.minimum(expert_M, E - 1)] for y, b_EF in zip([h, *gate], biases, strict=True))
        y_MD = jax.lax.ragged_dot(self._activated(h, gate), weights[-1], tokens_E)
        gate_M = routes.gate_BTk.reshape(-1)[order_M].astype(y_MD.dtype)
        y_MD = jnp.where((expert_M < E)[:, None], y_MD * gate_M[:, None], 0)
        return jnp.zeros_like(x_ND).at[token_M].add(y_MD).reshape(x_BTD.shape)


def on_devices(
    grouped: Callable[..., Array], x_BTD: Array, routes: Routes, weights: list[Array], biases: list[Array]
) -> Array:
    """`grouped` on the devices where the experts are: all of the weights are up, perhaps gate, and down."""
    mesh = mesh_in_use()
    if not mesh:
        return grouped(x_BTD, routes, weights, biases)
    axes = ["EDF"] * (len(weights) - 1) + ["EFD"]
    have = split(dict(zip("EDF", weights[0].shape, strict=True)), mesh)
    own = split(dict(zip("BTD", x_BTD.shape, strict=True)), mesh)
    experts = have.get("E", ())
    whole = own | {"B": tuple(axis for axis in own.get("B", ()) if axis not in experts)}
    want = split(dict(zip("EDF", weights[0].shape, strict=True)), mesh, {k: v for k, v in whole.items() if k != "D"})
    shared = [axis for axis in own.get("B", ()) if axis in experts]
    rows = axes_of(whole, "BT")

    def local(x_BTD: Array, routes: Routes, weights: list[Array], biases: list[Array]) -> Array:
        x_BTD = varying(gathered(x_BTD, "BTD", own, whole), axes_of(want, "EF"), shared)
        routes = Routes(*(gathered(x, "BT.", own, whole) for x in routes))
        weights = [
            gathered(varying(w, rows, axes_of(have, letters)), letters, have, want)
            for w, letters in zip(weights, axes, strict=True)
        ]
        first = jax.lax.axis_index(experts) * weights[0].shape[0] if experts else 0
        y_BTD = grouped(x_BTD, routes._replace(chosen_BTk=routes.chosen_BTk - first), weights, biases)
        for axis in shared:
            y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=0, tiled=True)
        over = [axis for axis in axes_of(want, "EF") if axis not in shared]
        return jax.lax.psum(y_BTD, over) if over else y_BTD

    x_spec, routes_specs = spec("BTD", own), jax.tree.map(lambda _: spec("BT.", own), routes)
    inputs = (x_spec, routes_specs, [spec(letters, have) for letters in axes], [spec("EF", have) for _ in biases])
    run = jax.checkpoint(local, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    return jax.shard_map(run, in_specs=inputs, out_specs=x_spec)(x_BTD, routes, weights, biases)
