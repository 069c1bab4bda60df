"""A custom objective: R-Drop (Liang et al. 2021), where two passes that drop out differently have to agree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from reversal import TINY, draw, init, train

import transformer_jax as tj

MODE = "encoder-decoder"


def r_drop(model: tj.Transformer, weight: float) -> tj.Loss:
    """A loss as `train_step` takes it: sums over the tokens that count, no means, so that batches can be split."""

    def loss(params: Any, batch: tj.Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        target, source = jax.tree.map(lambda x: jnp.concatenate([x, x]), (batch.target, batch.source))
        logits = model.apply({"params": params}, target, source, rngs=None if key is None else {"dropout": key})
        p, q = jnp.split(jax.nn.log_softmax(logits), 2)  # of the two passes
        said = jnp.take_along_axis((p + q) / 2, batch.labels[..., None], -1)[..., 0]
        apart = ((jnp.exp(p) - jnp.exp(q)) * (p - q) / 2).sum(-1)  # the divergence, the mean of both ways
        each = {"loss": -said, "tokens": 1, "correct": (p + q).argmax(-1) == batch.labels, "apart": apart}
        sums = {name: jnp.sum(batch.weights * value) for name, value in each.items()}
        return sums["loss"] + weight * sums["apart"], sums

    return loss


def main(steps: int = 400) -> dict[float, float]:
    """By the weight of their disagreement, how much two passes disagree in the end."""
    model = tj.Transformer(TINY.replace(mode=MODE, dropout_rate=0.1))
    batch, found = draw(jax.random.key(9), MODE), {}
    measure = jax.jit(r_drop(model, 0.0))
    for weight in (0.0, 1.0):
        params, losses = train(init(model), steps, MODE, r_drop(model, weight), optax.adamw(1e-2))
        sums = measure(params, batch, jax.random.key(2))[1]
        found[weight] = float(sums["apart"] / sums["tokens"])
        print(f"weight {weight}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {sums['loss'] / sums['tokens']:.2f} on new")
        print(f"  two passes that drop out disagree by {found[weight]:.3f} nats a token")
    return found


if __name__ == "__main__":
    main()
