"""What 8-bit keys and values cost: `python scripts/measure_int8.py RUN --data FILE... [--limit 512]`.

Decodes the given targets, each token forced, with the cache in the model's own type and in 8 bits, and prints the loss
of both in nats a token, the bytes of the cache, and how often the likeliest token is another.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.sources import read
from transformer_jax.decoding.batches import bucket, padded
from transformer_jax.decoding.model import follow, right_aligned
from transformer_jax.evaluate import check_kind
from transformer_jax.model.cache import Room
from transformer_jax.run import load_run
from transformer_jax.scoring import questions_of

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=512)
    args = parser.parse_args()
    run = load_run(args.run)
    model, params, most = run.model, {"params": run.params}, run.config.model.max_length
    corpus = check_kind(run, read(tuple(args.data)))
    questions = [each for part in questions_of(corpus, run.config, run.tokenizer) for each in part]
    questions = questions[: args.limit // BATCH * BATCH]

    def forced(prompt, said, source, int8):
        """Log-probabilities [B, F] of the said tokens, the likeliest ones, and the cache's bytes."""
        (B, P), F = prompt.ids.shape, said.shape[1]
        memory: Any = model.apply(params, source, method="encode")
        room = Room(P + F - 1, int8=int8)
        logits, cache = model.apply(params, right_aligned(prompt), memory, None, room, True, method="decode")

        def step(carry, number):
            logits, cache = carry
            log = jax.nn.log_softmax(logits)[jnp.arange(B), said[:, number]]
            places = prompt.lengths + number
            following, cache = follow(model, run.params, memory, cache, said[:, number, None], places, beams=False)
            return (following[:, 0], cache), (log, logits.argmax(-1))

        _, (log, best) = jax.lax.scan(step, (logits[:, 0], cache), jnp.arange(F))
        return log.T, best.T

    compiled = jax.jit(forced, static_argnames="int8")
    totals, changed, tokens = {False: 0.0, True: 0.0}, 0, 0
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        seen, said = [question[0][1] for question in part], [question[1] for question in part]
        sources = [question[0][0] for question in part if question[0][0] is not None]
        prompt = padded(seen, BATCH, bucket(max(map(len, seen)), most))
        source = padded(sources, BATCH, bucket(max(map(len, sources)), most)) if sources else None
        answer = padded(said, BATCH, bucket(max(map(len, said)), most))
        counts, best = answer.segments > 0, {}
        for int8 in totals:
            log, best[int8] = (np.asarray(x) for x in compiled(prompt, jnp.asarray(answer.ids), source, int8=int8))
            totals[int8] -= float(log[counts].sum())
        changed += int((best[True] != best[False])[counts].sum())
        tokens += int(counts.sum())
    heads, width = run.config.model.num_kv_heads, run.config.model.head_dim
    size = jnp.dtype(run.config.model.dtype).itemsize
    print(f"{tokens:,} tokens of {len(questions)} texts")
    print("| cache | loss, nats a token | bytes a token and layer |\n| --- | --- | --- |")
    print(f"| {run.config.model.dtype} | {totals[False] / tokens:.6f} | {2 * heads * width * size} |")
    print(f"| 8 bits | {totals[True] / tokens:.6f} | {2 * heads * (width + 4)} |")
    print(f"\nAnother token is the likeliest in {changed / tokens:.2%} of the places.")


if __name__ == "__main__":
    main()
