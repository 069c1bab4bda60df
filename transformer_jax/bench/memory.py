"""`transformer-jax bench memory`: what gradients and a step need, by how the loss is made and what is kept.

No step is run: the figures are XLA's own plan of the compiled program, which is what it allocates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer_jax.bench.subject import ADAMW, Subject
from transformer_jax.config import LossConfig
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import Loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.partition import compiler_options, part_bytes
from transformer_jax.recipes import find_recipe
from transformer_jax.step import train_step
from transformer_jax.surroundings import surroundings
from transformer_jax.tokens import Batch

GPT2 = find_recipe("gpt2-124m").model.replace(dtype="float32", max_length=1024)
CASES = {
    "gpt2-124m": Subject(GPT2, 4, 1024),
    "gpt2-124m, recomputed": Subject(GPT2.replace(remat="full"), 4, 1024),
    "gpt2-124m, recomputed, bfloat16": Subject(GPT2.replace(remat="full", dtype="bfloat16"), 4, 1024),
}


def plain_loss(subject: Subject) -> Loss:
    """Cross-entropy as most code has it: of the logits of all tokens, by Optax, left to automatic differentiation."""
    model = Transformer(subject.config)

    def loss(params: Any, batch: Batch, _: Any) -> tuple[Any, Any]:
        logits_BTV = jnp.asarray(model.apply({"params": params}, batch.target, batch.source), jnp.float32)
        loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.labels)
        hits = jnp.sum(logits_BTV.argmax(-1) == batch.labels)
        sums = {"loss": jnp.sum(loss_BT), "tokens": jnp.sum(batch.weights), "correct": hits.astype(jnp.float32)}
        return sums["loss"], sums

    return loss


PARTS, WHOLE, PLAIN = "logits in parts", "all logits at once", "all logits, by autodiff"
# how the loss is made, None for `plain_loss`
WAYS = {PLAIN: None, WHOLE: LossConfig(logits_mib=0), PARTS: LossConfig()}


def _temporary(lowered: Any) -> int:
    return lowered.compile(compiler_options()).memory_analysis().temp_size_in_bytes


def measure(subject: Subject, say: Callable[[str], None]) -> dict[str, Any]:
    """All ways of a case: the gradient function by itself, whose result is no temporary, and the step with AdamW."""
    state, batch, ways = jax.eval_shape(subject.first, jax.random.key(0)), subject.draw(), {}
    params = part_bytes(state.params)
    for name, config in WAYS.items():
        say(name)
        loss = plain_loss(subject) if config is None else subject.parts(config)[0]
        step = functools.partial(train_step, loss=loss, optimizer=make_optimizer(ADAMW, 1000))
        gradients = _temporary(jax.jit(jax.grad(loss, has_aux=True)).lower(state.params, batch, None))
        ways[name] = {
            "gradients_in_all_bytes": 2 * params + gradients,
            "state_bytes": part_bytes(state),
            "temp_bytes": _temporary(jax.jit(step, donate_argnums=0).lower(state, batch)),
        }
    return {"batch": subject.batch, "length": subject.length, "ways": ways}


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it; nothing is timed, so nothing is repeated."""
    result: dict[str, Any] = {"bench": "memory", **surroundings(), "repeats": 0, "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("case", "loss", "gradients", "/ by autodiff", "state", "temporary", "/ by autodiff", "step / by autodiff")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found = []
    for name, case in result["cases"].items():
        base = case["ways"][PLAIN]
        for way, row in case["ways"].items():
            sizes = {kind: f"{size / 1e6:,.0f} MB" for kind, size in row.items()}
            shares = {kind: f"{size / base[kind]:.0%}" for kind, size in row.items()}
            step = (row["state_bytes"] + row["temp_bytes"]) / (base["state_bytes"] + base["temp_bytes"])
            gradients = sizes["gradients_in_all_bytes"], shares["gradients_in_all_bytes"]
            temporary = sizes["temp_bytes"], shares["temp_bytes"]
            found.append((name, way, *gradients, sizes["state_bytes"], *temporary, f"{step:.0%}"))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    shapes = {f"{case['batch']} rows of {case['length']:,} tokens" for case in result["cases"].values()}
    return [
        f"XLA's plan for {' or '.join(sorted(shapes))}. Gradients: the loss and its gradients by themselves, with the "
        "parameters. State: parameters and AdamW's moments. Temporary: what a step needs besides, with its gradients. "
        "Recomputed: `--model.remat full`."
    ]
