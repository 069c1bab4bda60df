"""Published families without PyTorch: tiny models that `transformers` made, with the logits and texts that it gave
(parity/oracle.py wrote them)."""

from pathlib import Path

import numpy as np
import pytest
from agreement import comes_back, logits_agree, texts_agree

from transformer_jax.huggingface.families import FAMILIES
from transformer_jax.huggingface.folder import CONFIG, read_json
from transformer_jax.safetensors_file import SafetensorsFile

FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())
every_fixture = pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)


def expected(folder):
    with SafetensorsFile(folder / "expected.safetensors") as file:
        return {name: np.array(file[name]) for name in file}


def test_every_family_has_one():
    assert {read_json(folder / CONFIG)["model_type"] for folder in FIXTURES} == set(FAMILIES)


@every_fixture
def test_logits_agree(folder):
    logits_agree(folder, expected(folder))


@every_fixture
def test_what_goes_out_is_what_came_in(folder, tmp_path):
    comes_back(folder, tmp_path / "out")


@pytest.mark.parametrize("penalty", [None, *(pytest.param(each, marks=pytest.mark.long) for each in (0.6, 1.0, 1.4))])
@pytest.mark.parametrize("folder", ["gpt2", "llama", "t5", "bart", "marian"])
def test_texts_agree(folder, penalty):
    where = FIXTURES[0].parent / folder
    texts_agree(where, expected(where), penalty)
