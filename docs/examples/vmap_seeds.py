"""A sweep in one compiled program: `jax.vmap` over seeds and learning rates. Members train as if they were alone."""

import jax
import numpy as np
import optax
from reversal import TINY, init, train

import transformer_jax as tj

MODE, RATES, SEEDS = "decoder-only", np.array([1e-3, 3e-3, 1e-2]), np.arange(3)


def main(steps: int = 100) -> np.ndarray:
    """The final loss of each learning rate and seed."""
    model = tj.Transformer(TINY.replace(mode=MODE, dtype="float64", param_dtype="float64"))

    def member(rate: jax.Array, seed: jax.Array) -> jax.Array:
        """The loss of each step of one run, from its first parameters on a function of these two numbers."""
        return train(init(model, seed), steps, MODE, tj.make_loss(model), optax.adamw(rate), seed)[1]

    sweep = jax.jit(jax.vmap(jax.vmap(member, (None, 0)), (0, None)))
    losses = np.asarray(sweep(RATES, SEEDS))  # [rates, seeds, steps]
    final = losses[..., -steps // 10 :].mean(-1)
    for rate, row in zip(RATES, final, strict=True):
        print(f"learning rate {rate:.0e}: loss {row.mean():.3f}, {row.std():.3f} between {len(row)} seeds")
    alone = jax.jit(member)
    difference = max(np.abs(alone(RATES[i], SEEDS[j]) - losses[i, j]).max() for i, j in np.ndindex(final.shape))
    assert difference < 1e-5, difference
    print(f"each, trained alone, has the same loss at every step, to {difference:.0e}")
    return final


if __name__ == "__main__":
    with jax.enable_x64(True):  # in float32 rounding grows from step to step, and vmap rounds in another order
        main()
