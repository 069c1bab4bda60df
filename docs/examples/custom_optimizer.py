"""A custom optimizer: cautious AdamW (Liang et al. 2024), which moves a weight only where its gradient agrees."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from reversal import TINY, init, train

import transformer_jax as tj

MODE, RATE = "decoder-only", 1e-2


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leaves out of an update what goes against the gradient at hand, and makes up for it in the rest (section 3)."""

    def agreeing(update: jax.Array, gradient: jax.Array) -> jax.Array:
        agrees = (update * gradient > 0).astype(update.dtype)
        return update * agrees / jnp.maximum(agrees.mean(), 1e-3)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params)
        return jax.tree.map(agreeing, updates, gradients), state

    return optax.GradientTransformation(inner.init, update)


def main(steps: int = 300) -> dict[str, jax.Array]:
    """The loss of each step by optimizer; `train_step` takes whatever has Optax's `init` and `update`."""
    model = tj.Transformer(TINY.replace(mode=MODE))
    end = [optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(RATE)]
    optimizers = {
        "AdamW": optax.chain(optax.scale_by_adam(b2=0.98), *end),
        "cautious AdamW": optax.chain(cautious(optax.scale_by_adam(b2=0.98)), *end),
    }
    found = {}
    for name, optimizer in optimizers.items():
        found[name] = train(init(model), steps, MODE, tj.make_loss(model), optimizer)[1]
        means = found[name].reshape(6, -1).mean(1)
        print(f"{name:14} loss of each sixth of {steps} steps: {' '.join(f'{mean:.3f}' for mean in means)}")
    return found


if __name__ == "__main__":
    main()
