"""Tokens and Batch: the only data that crosses files on its way to the loss.

Their arrays are NumPy's on the host and JAX's on a device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

Array = jax.Array
# Places of a batch: which of its rows a process reads.
Mine = slice | np.ndarray
ALL = slice(None)


class Tokens(struct.PyTreeNode):
    """Token sequences that know themselves.

    Attributes:
        ids: int32[B, T], rows of the embedding table.
        segments: int32[B, T], 0 for padding and 1, 2, ... for the documents packed into a row.
        positions: int32[B, T], place within the document, from 0.
        prefix: bool[B, T] or None, the tokens that all of their document may see (prefix LM); None for no token.
        lineage: bool[B, T, W] or None, where W sequences go on side by side in a row: those that descend from it.
    """

    ids: Any
    segments: Any
    positions: Any
    prefix: Any = None
    lineage: Any = None

    @classmethod
    def from_ids(cls, ids: ArrayLike, pad_id: int | None = None, prefix: bool = False) -> "Tokens":
        """One document a row; `pad_id` marks padding, on either side of it, and None means that there is none."""
        ids_BT = jnp.asarray(ids, jnp.int32)
        if ids_BT.ndim != 2:
            raise ValueError(f"ids must have the shape [batch, length]; got {ids_BT.shape}.")
        used_BT = jnp.ones_like(ids_BT) if pad_id is None else (ids_BT != pad_id).astype(jnp.int32)
        positions_BT = jnp.maximum(jnp.cumsum(used_BT, -1) - 1, 0)
        return cls(ids_BT, used_BT, positions_BT, used_BT > 0 if prefix else None)

    @property
    def lengths(self) -> Array:
        """int32[B], the number of tokens that are not padding."""
        return (self.segments > 0).sum(-1)


class Batch(struct.PyTreeNode):
    """What one step learns from.

    Attributes:
        target: what the decoder sees, [B, T].
        labels: int32[B, T], the token to predict at each position.
        weights: float32[B, T], 1 where the loss counts and 0 elsewhere.
        source: what the encoder sees, [B, S]; None for a decoder-only model.
    """

    target: Tokens
    labels: Any
    weights: Any
    source: Tokens | None = None


def check_ids(ids: ArrayLike, vocab_size: int, what: str = "token id") -> None:
    """Raises ValueError where a number is outside of its table, which a device would clamp, wrap or fill with NaN."""
    numbers = np.asarray(ids)
    wrong = np.argwhere((numbers < 0) | (numbers >= vocab_size))
    if len(wrong):
        place = tuple(int(index) for index in wrong[0])
        raise ValueError(
            f"{what} {numbers[place]} at {list(place)} is outside of its table: it must be at least 0 and below "
            f"{vocab_size}."
        )


def check_tokens(tokens: Tokens, vocab_size: int, max_length: int, what: str = "") -> Tokens:
    """The same tokens; raises ValueError where an id or a position is outside of its table."""
    check_ids(tokens.ids, vocab_size, f"{what} token id".lstrip())
    check_ids(tokens.positions, max_length, f"{what} position".lstrip())
    return tokens


def check_batch(batch: Batch, vocab_size: int, max_length: int, source_vocab_size: int | None = None) -> Batch:
    """The same batch; raises ValueError where an id, a label or a position is outside of its table."""
    check_tokens(batch.target, vocab_size, max_length, "target")
    check_ids(batch.labels, vocab_size, "label")
    if batch.source is not None:
        check_tokens(batch.source, source_vocab_size or vocab_size, max_length, "source")
    return batch
