"""Where numbers went wrong: the first module of a step whose values are not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from transformer_jax.axes import SCANNED, path_names
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import Loss
from transformer_jax.partition import Partitioner
from transformer_jax.tokens import Batch

Array = jax.Array
Call = tuple[str, ...]  # a module's path and its method


def count_nonfinite(tree: Any) -> Array:
    """How many numbers of a tree are not finite."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array | np.ndarray)]
    floats = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in floats), jnp.zeros(()))


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(path)): np.asarray(leaf) for path, leaf in leaves}


def _in_order(calls: list[Call], counts: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    """(call, count) as the model computes them: layers that are scanned over one after the other."""
    found: list[tuple[str, float]] = []
    stretch: list[tuple[str, np.ndarray]] = []

    def unroll() -> None:
        for layer in range(max((len(each) for _, each in stretch), default=0)):
            found.extend((f"{name} of layer {layer}", float(each[layer])) for name, each in stretch)
        stretch.clear()

    for call in calls:
        for name in (name for name in counts if name.rpartition("/")[0] == "/".join(call)):
            if SCANNED in call and counts[name].ndim:
                stretch.append(("/".join(call[:-1]), counts[name]))
            else:
                unroll()
                found.append(("/".join(call[:-1]), float(counts[name].sum())))
    unroll()
    return found


def make_diagnosis(model: Transformer, loss: Loss, partitioner: Partitioner, key: Array) -> Callable[[Any, Any], str]:
    """(params, batch on its devices) -> the first module whose values are not finite, `decoder/block_0/feed_forward`.

    Where they all are, it is the first parameter in the backward pass whose gradient is not; `""` where all is well.

    `key` is of dropout, as near to a step's as one pass over the whole batch can be.
    """
    calls: list[Call] = []

    def note(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = method(*args, **kwargs)
        if context.method_name != "setup":
            context.module.sow("nonfinite", context.method_name, count_nonfinite(out))
            call = (*context.module.path, context.method_name)
            calls.append(call) if call not in calls else None
        return out

    def counts(params: Any, batch: Batch) -> dict[str, Any]:
        with nn.intercept_methods(note):
            _, sown = model.apply(
                {"params": params}, batch.target, batch.source, rngs={"dropout": key}, mutable=["sums", "nonfinite"]
            )
        grads, sums = jax.grad(loss, has_aux=True)(params, batch, key)
        return {
            "forward": sown["nonfinite"],
            "backward": jax.tree.map(count_nonfinite, grads),
            "loss": count_nonfinite(sums),
        }

    program = partitioner.evaluate(counts)

    def diagnose(params: Any, batch: Any) -> str:
        found = jax.device_get(program(params, batch))
        forward = _in_order(calls, _by_path(found["forward"]))
        for name, count in forward:
            if count:
                return name or "the output"
        if found["loss"]:
            return "the loss"
        order = [name.partition(" ")[0] for name, _ in forward]
        wrong = [name for name, count in _by_path(found["backward"]).items() if count.any()]

        def place(name: str) -> int:
            """Where in the forward pass the module of a parameter is: the last is the first in the backward pass."""
            return max((i for i, module in enumerate(order) if name.startswith(module)), default=-1)

        return f"the gradient of {max(wrong, key=place)}" if wrong else ""

    return diagnose
