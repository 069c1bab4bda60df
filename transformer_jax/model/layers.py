"""The layers that own parameters: linear maps, norms, embeddings, feed-forward and the residual around a sublayer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

from transformer_jax.axes import sizes
from transformer_jax.config import ModelConfig

Array = jax.Array


def constrain(x: Array, letters: str) -> Array:
    """Name the axes of an activation, so that the partitioner can say where it lives; the same values. `.` is whole."""
    return spmd.with_logical_constraint(x, tuple(None if letter == "." else letter for letter in letters))


def dtype_of(config: ModelConfig) -> Any:
    return jnp.dtype(config.dtype)


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Einsum(nn.Module):
    """A linear map written as an einsum, such as `BTD,DHK->BTHK`: its letters shape, initialise and shard the weight.

    Parameters: `w_...` with the weight's letters, drawn from a truncated normal of variance 1 / fan-in; and with
    `bias` a zero `b_...` with the letters that the output has from the weight.
    """

    spec: str
    config: ModelConfig
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, y_axes = self.spec.split("->")
        x_axes, w_axes = inputs.split(",")
        length = sizes(self.config)

        def places(wanted: Callable[[str], bool]) -> tuple[int, ...]:
            return tuple(place for place, letter in enumerate(w_axes) if wanted(letter))

        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=places(lambda letter: letter not in y_axes),
            out_axis=places(lambda letter: letter not in x_axes),
            batch_axis=places(lambda letter: letter in x_axes and letter in y_axes),
        )
        param_dtype = jnp.dtype(self.config.param_dtype)
        w = self.param(f"w_{w_axes}", init, tuple(length[letter] for letter in w_axes), param_dtype)
        y = jnp.einsum(self.spec, x, w.astype(x.dtype))
        if self.bias:
            b_axes = "".join(letter for letter in y_axes if letter in w_axes)
            shape = tuple(length[letter] for letter in b_axes)
            y += self.param(f"b_{b_axes}", nn.initializers.zeros, shape, param_dtype).astype(x.dtype)
        return constrain(y, y_axes)


def layer_norm(x: Array, eps: float) -> Array:
    """Zero mean and unit variance over the last axis (Ba et al. 2016, equation 4), without scale and bias."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)


def rms_norm(x: Array, eps: float) -> Array:
    """Unit root mean square over the last axis (Zhang and Sennrich 2019, equation 4), without scale."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


# name: (function, whether it can have a bias)
NORMS: dict[str, tuple[Callable[[Array, float], Array], bool]] = {
    "layernorm": (layer_norm, True),
    "rmsnorm": (rms_norm, False),
}


class Norm(nn.Module):
    """The config's norm over the last axis, whose letter is `axis`, in at least float32, with its learned scale."""

    config: ModelConfig
    axis: str = "D"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        function, biased = NORMS[self.config.norm]
        width, param_dtype = (x.shape[-1],), jnp.dtype(self.config.param_dtype)
        y = function(at_least_float32(x), self.config.norm_eps)
        y *= self.param(f"scale_{self.axis}", nn.initializers.ones, width, param_dtype)
        if biased and self.config.use_bias:
            y += self.param(f"bias_{self.axis}", nn.initializers.zeros, width, param_dtype)
        return y.astype(x.dtype)


class Embedding(nn.Module):
    """The table that turns ids into vectors and, where it is tied, vectors into logits (Vaswani et al. 2017, 3.4).

    Its entries have the variance 1 / d_model: scaled embeddings and tied logits both start near unit variance.
    """

    config: ModelConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.d_model)
        init = nn.initializers.normal(self.config.d_model**-0.5)
        self.table_VD = self.param("table_VD", init, shape, jnp.dtype(self.config.param_dtype))

    def __call__(self, ids_BT: Array) -> Array:
        # V whole during the gather, else XLA rematerialises the table on every device
        table_VD = constrain(self.table_VD.astype(dtype_of(self.config)), ".D")
        x_BTD = constrain(table_VD[ids_BT], "BTD")
        return x_BTD * jnp.asarray(self.config.d_model**0.5, x_BTD.dtype) if self.config.scale_embeddings else x_BTD

    def attend(self, x_BTD: Array) -> Array:
        """Logits in at least float32, [B, T, V]."""
        kind = jnp.promote_types(x_BTD.dtype, jnp.float32)
        table_VD = self.table_VD.astype(x_BTD.dtype)
        return constrain(jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=kind), "BTV")


def gelu(x: Array) -> Array:
    """x times the normal distribution function (Hendrycks and Gimpel 2016).

    Written with erf: `jax.nn.gelu(approximate=False)` goes through erfc, several times slower on CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021 (Primer)
    "tanh": jnp.tanh,
}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them (Vaswani et al. 2017, 3.3), gated if asked (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        h_BTF = Einsum("BTD,DF->BTF", config, config.use_bias, name="up")(x_BTD)
        if config.gated:
            h_BTF *= activation(Einsum("BTD,DF->BTF", config, config.use_bias, name="gate")(x_BTD))
        else:
            h_BTF = activation(h_BTF)
        return Einsum("BTF,FD->BTD", config, config.use_bias, name="down")(h_BTF)


# Where a sublayer has norms: before it, on what it adds (inside), after the sum.
PLACEMENTS: dict[str, tuple[str, ...]] = {"pre": ("before",), "post": ("after",), "sandwich": ("before", "inside")}


class Dropout(nn.Module):
    """Dropout where there is a key for it: training has one, evaluation has none."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Residual(nn.Module):
    """x + f(x), with norms where the placement has them and dropout on what is added."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, f: Callable[[Array], Array]) -> Array:
        places = PLACEMENTS[self.config.norm_placement]

        def norm(place: str, x: Array) -> Array:
            return Norm(self.config, name=place)(x) if place in places else x

        y_BTD = norm("inside", f(norm("before", x_BTD)))
        x_BTD = x_BTD + Dropout(self.config.dropout_rate)(y_BTD)
        return constrain(norm("after", x_BTD), "BTD")
