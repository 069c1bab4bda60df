"""What all ways to decode have in common: a request, and the model as a function from tokens and cache to logits."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.decoding.choice import Choice
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.transformer import Memory, Transformer
from transformer_jax.tokens import Tokens

Array = jax.Array


class Generated(struct.PyTreeNode):
    """What `generate` returns; with several sequences for a prompt each has an axis after B, the best first.

    Attributes:
        ids: int32[B, max_new_tokens], the new tokens alone, `pad_id` after the end token.
        scores: float32[B], the summed log-probability of the new tokens, the end token included; by beam search it is
            divided by length ** length_penalty.
        lengths: int32[B], the number of new tokens, the end token included.
    """

    ids: Array
    scores: Array
    lengths: Array


class Plan(NamedTuple):
    """What a decoding loop is compiled for, besides the shapes of a request."""

    max_new_tokens: int
    beam_size: int = 1
    num_return: int = 1
    int8: bool = False


class Request(struct.PyTreeNode):
    """What is to be decoded.

    Attributes:
        prompt: Tokens, [B, P], padded on either side.
        source: Tokens, [B, S], or None.
        row: int32[B], the number that tells the drawing of a row apart from others.
        stops: int32[E], the tokens that end a sequence.
        pad_id: int32, fills the result after the end.
        length_penalty: float32, the exponent on the length that a beam's score is divided by.
        early_stopping: bool, a row is done once as many sequences have ended as there are beams.
    """

    prompt: Tokens
    source: Tokens | None
    row: Any
    choice: Choice
    stops: Any
    pad_id: Any
    length_penalty: Any
    early_stopping: Any

    def limit(self, model: Transformer, plan: Plan) -> Array:
        """int32[B], the most new tokens of each row."""
        return jnp.minimum(plan.max_new_tokens, model.config.max_length - self.prompt.lengths)


def right_aligned(tokens: Tokens) -> Tokens:
    """The same rows with all padding on the left, so that every row goes on in the same slot."""
    order_BT = jnp.argsort(tokens.segments > 0, -1, stable=True)
    return jax.tree.map(lambda x_BT: jnp.take_along_axis(x_BT, order_BT, 1), tokens)


def read(model: Transformer, params: Any, request: Request, room: Room) -> tuple[Array, Cache, Memory | None]:
    """Logits [B, V] after the prompt, the cache that holds it, and the encoder's output."""
    memory = cast(Memory | None, model.apply({"params": params}, request.source, method="encode"))
    prompt = right_aligned(request.prompt)
    if room.width > 1:
        prompt = prompt.replace(lineage=jnp.ones((*prompt.ids.shape, room.width), bool))
    out = model.apply({"params": params}, prompt, memory, None, room, True, method="decode")
    logits_BTV, cache = cast(tuple[Array, Cache], out)
    return logits_BTV[:, -1], cache, memory


def follow(
    model: Transformer, params: Any, memory: Memory | None, cache: Cache, ids_BT: Array, places_B: Array, beams: bool
) -> tuple[Array, Cache]:
    """Logits [B, T, V] after the next tokens, and the cache with them.

    They are the next T of each row, the first of them at `places_B`; or, of T beams, the next one of each.
    """
    (B, T), lineage = ids_BT.shape, None
    places_BT = places_B[:, None] + (jnp.zeros(T, jnp.int32) if beams else jnp.arange(T))
    places_BT = jnp.minimum(places_BT, model.config.max_length - 1).astype(
        jnp.int32
    )  # rows that have ended are still computed
    if beams:
        lineage = jnp.broadcast_to(jnp.eye(T, dtype=bool), (B, T, T))
    tokens = Tokens(ids_BT, jnp.ones((B, T), jnp.int32), places_BT, lineage=lineage)
    return cast(tuple[Array, Cache], model.apply({"params": params}, tokens, memory, cache, method="decode"))


def is_stop(ids: Array, stops_E: Array) -> Array:
    """Which tokens end their sequence."""
    return (ids[..., None] == stops_E).any(-1)
