"""Laws of what reaches a device: no id, label or position outside of its table does."""

import jax
import numpy as np
import pytest
from variants import TINY, example, variables, variant

from transformer_jax import Batch, Tokens, Transformer, generate
from transformer_jax.tokens import check_batch, check_ids

SIZE, LENGTH = TINY["vocab_size"], TINY["max_length"]


def batch_of(mode="encoder-decoder"):
    target, source = jax.tree.map(np.array, example(variant("plain", mode)))
    return Batch(target, target.ids.copy(), np.ones(target.ids.shape, np.float32), source)


@pytest.mark.parametrize("bad", [-1, -(2**31), SIZE, 65_535, 2**31 - 1])
def test_an_id_outside_of_the_table_is_named(bad):
    ids = np.full((2, 6), SIZE - 1, np.int64)
    check_ids(ids, SIZE)
    check_ids(ids[:0], SIZE)
    ids[1, 4] = bad
    with pytest.raises(ValueError, match=rf"token id {bad} at \[1, 4\].*at least 0 and below {SIZE}"):
        check_ids(ids, SIZE)


@pytest.mark.parametrize(
    ("part", "limit"),
    [
        ("target.ids", SIZE),
        ("target.positions", LENGTH),
        ("labels", SIZE),
        ("source.ids", SIZE),
        ("source.positions", LENGTH),
    ],
)
@pytest.mark.parametrize("below", [True, False])
def test_every_part_of_a_batch_is_checked(part, limit, below):
    batch = batch_of()
    assert check_batch(batch, SIZE, LENGTH) is batch
    array = batch
    for name in part.split("."):
        array = getattr(array, name)
    array[-1, -1] = -1 if below else limit
    with pytest.raises(
        ValueError, match=f"{part.split('.')[0].removesuffix('s')}.* must be at least 0 and below {limit}"
    ):
        check_batch(batch, SIZE, LENGTH)


@pytest.mark.parametrize("bad", [-1, SIZE])
def test_generate_refuses_them(bad):
    config = variant("plain", "encoder-decoder")
    model, params = Transformer(config), variables(config)["params"]
    good, wrong = np.ones((1, 3), np.int32), np.array([[1, bad, 1]])
    for prompt, source, name in ((wrong, good, "prompt"), (good, wrong, "source")):
        with pytest.raises(ValueError, match=f"{name} token id {bad} at "):
            generate(model, params, prompt, source=source, max_new_tokens=2)
    far = Tokens(good, good, np.array([[0, 1, LENGTH]]))
    with pytest.raises(ValueError, match=f"prompt position {LENGTH} at "):
        generate(model, params, far, source=good, max_new_tokens=2)
