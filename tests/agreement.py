"""What must hold of a folder of `transformers` and of what it computed with it (see parity/oracle.py)."""

import json
from pathlib import Path

import jax
import numpy as np

from transformer_jax import Tokens, Transformer, generate
from transformer_jax.huggingface.folder import CONFIG, WEIGHTS, read_pretrained, write_pretrained
from transformer_jax.safetensors_file import SafetensorsFile

BEAM = 4


def tokens(ids, mask):
    places = np.maximum(np.cumsum(mask, -1) - 1, 0)
    return Tokens(*(np.asarray(x, np.int32) for x in (ids, mask, places)))


def target_and_source(expected, kind=""):
    """(target, source or None) of a batch of theirs."""
    source = expected.get("source_ids")
    read = None if source is None else tokens(source, expected["source_mask"])
    return tokens(expected[f"{kind}ids"], expected[f"{kind}mask"]), read


def logits(config, params, target, source):
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, target, source))


def logits_agree(folder, expected):
    """To 1e-4, over rows with padding on either side; of an encoder-decoder the target's is on the right."""
    real, theirs = expected["mask"] > 0, expected["logits"]
    found = logits(*read_pretrained(folder), *target_and_source(expected))
    assert np.abs(theirs[real]).max() > 0.5
    np.testing.assert_allclose(found[real], theirs[real], rtol=0, atol=1e-4)


def comes_back(folder: Path, out: Path, **ids):
    """Written again, its tensors are the same bytes."""
    kind = json.loads((folder / CONFIG).read_text())["model_type"]
    write_pretrained(out, kind, *read_pretrained(folder), **ids)
    with SafetensorsFile(folder / WEIGHTS) as before, SafetensorsFile(out / WEIGHTS) as after:
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def texts_agree(folder, expected, penalty=None, **more):
    """The same ids greedily, or by a beam of 4; the ends of texts come at different places."""
    config, params = read_pretrained(folder)
    target, source = target_and_source(expected, "prompt_")
    theirs = expected["greedy"] if penalty is None else expected[f"beam_{penalty}"]
    options = dict(source=source, eos_id=int(expected["end"]), pad_id=int(expected["pad"]))
    beam = {} if penalty is None else dict(beam_size=BEAM, length_penalty=penalty, **more)
    found = generate(Transformer(config), params, target, max_new_tokens=theirs.shape[1], **options, **beam)
    np.testing.assert_array_equal(np.asarray(found.ids), theirs)
    assert penalty is not None or (theirs == options["eos_id"]).any()
