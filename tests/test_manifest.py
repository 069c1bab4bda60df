"""Laws of manifests: a sealed folder is sound, every change to any byte or name is found, and `sha256sum` agrees."""

import os
import random
import shutil
import subprocess

import pytest

from transformer_jax.manifest import MANIFEST, damage, seal

FILES = {"facts.json": b'{"step": 3}\n', "state/params/d/0a1b": os.urandom(999), "state/empty": b"", "a b\u00e9": b"x"}


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "state" / "nothing").mkdir()
    seal(folder)
    return folder


def test_a_sealed_folder_is_sound(sealed):
    assert damage(sealed) == ""
    assert len((sealed / MANIFEST).read_text().splitlines()) == len(FILES)


def test_a_copied_or_moved_folder_is_sound(sealed):
    """Also with what a desktop leaves in it."""
    copy = sealed.with_name("copy")
    shutil.copytree(sealed, copy)
    shutil.move(sealed, sealed.with_name("moved"))
    (copy / ".DS_Store").write_text("x")
    assert damage(copy) == damage(sealed.with_name("moved")) == ""


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_it(sealed):
    check = subprocess.run(["sha256sum", "-c", MANIFEST], cwd=sealed, capture_output=True, text=True)
    assert (check.returncode, check.stdout.count(": OK")) == (0, len(FILES))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_bit_counts(sealed, name):
    """Every bit of every small file, the manifest's own included; of the others a thousand."""
    path = sealed / name
    whole, rng = path.read_bytes(), random.Random(0)
    bits = [(place, bit) for place in range(len(whole)) for bit in range(8)]
    for place, bit in bits if len(bits) < 1000 else rng.sample(bits, 1000):
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        path.write_bytes(broken)
        assert damage(sealed), (name, place, bit)
    path.write_bytes(whole)
    assert damage(sealed) == ""


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_other_change_is_found_and_named(sealed, name):
    path = sealed / name
    whole, short = path.read_bytes(), name.rpartition("/")[2]
    for content in {b"", whole[: len(whole) // 2], whole[:-1], whole + b"\0", bytes(len(whole)), whole * 2} - {whole}:
        path.write_bytes(content)
        assert short in damage(sealed)
    path.unlink()
    assert short in damage(sealed)
    path.symlink_to("/etc/hostname")
    assert damage(sealed)
    path.unlink()
    path.mkdir()
    assert damage(sealed)


def test_names_count(sealed):
    """A file more, one under another name, a line of the manifest less, an empty folder, a link, none at all."""
    (sealed / "more").write_text("x")
    assert damage(sealed) == f"more is not in {MANIFEST}"
    (sealed / "more").unlink()
    (sealed / "state/empty").rename(sealed / "state/full")
    assert "empty is missing" in damage(sealed)
    (sealed / "state/full").rename(sealed / "state/empty")
    lines = (sealed / MANIFEST).read_text().splitlines(keepends=True)
    (sealed / MANIFEST).write_text("".join(lines[1:]))
    assert "is not in" in damage(sealed)
    (sealed / MANIFEST).write_text("".join([*lines, lines[0]]))
    assert damage(sealed) == f"{MANIFEST} is damaged"
    link, empty = sealed.with_name("link"), sealed.with_name("empty")
    link.symlink_to(sealed)
    empty.mkdir()
    assert damage(link) == damage(sealed.with_name("none")) == "is not a folder of its own"
    assert MANIFEST in damage(empty)
