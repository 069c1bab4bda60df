"""A new attention without touching the package: a sigmoid weighs each key by itself (Ramapuram et al. 2024)."""

import jax
import jax.numpy as jnp
import optax
from reversal import LENGTH, PAD, TINY, draw, init, train

import transformer_jax as tj


def sigmoid(q_BTHK, k_BSGK, sight, cap):
    """Weights [B, H, T, S] that are about an even share at first, as softmax's, however many keys are seen."""
    mask_B1TS = sight.mask_BTS[:, None]
    seen_B1T1 = jnp.maximum(mask_B1TS.sum(-1, keepdims=True), 1)
    logits_BHTS = tj.attention_logits(q_BTHK, k_BSGK, sight, cap)
    return jnp.where(mask_B1TS, jax.nn.sigmoid(logits_BHTS - jnp.log(seen_B1T1)), 0)


def main(steps=400):
    tj.add_attention("sigmoid", sigmoid)
    for mode in ("encoder-decoder", "decoder-only"):
        model = tj.Transformer(TINY.replace(mode=mode, attention="sigmoid"))
        params, losses = train(init(model), steps, mode, tj.make_loss(model), optax.adamw(1e-2))
        print(f"{mode}: loss {losses[0]:.2f} -> {losses[-1]:.3f}")
        batch = draw(jax.random.key(1), mode)  # what is given is read at once, what is said with a cache
        given = tj.Tokens.from_ids(batch.target.ids[:, : 1 if batch.source else LENGTH + 1], PAD)
        said = tj.generate(model, params, given, source=batch.source, max_new_tokens=LENGTH).ids
        whole = tj.Tokens.from_ids(jnp.concatenate([given.ids, said], 1), PAD)  # and again in one pass without
        again = jax.jit(model.apply)({"params": params}, whole, batch.source).argmax(-1)[:, -LENGTH - 1 : -1]
        print(f"  {(again == said).mean():.0%} of what it says with a cache is what it says without")


if __name__ == "__main__":
    main()
