"""A folder's manifest: the SHA-256 of every file in it, by which damage is found before anything is read.

    b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9  state/params/d/8f1c...

One line a file, in the order of their names, in the format of `sha256sum`: `sha256sum -c MANIFEST.sha256` in the folder
checks it without us. It is strict, so no byte of it can change unseen either: each line is 64 hexadecimal digits, two
spaces, a name, a line feed; and every file of the folder has one.
"""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformer_jax.folders import sync, write_synced

MANIFEST = "MANIFEST.sha256"
LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")
THREADS = 4  # hashing lets go of Python's lock


def _names(folder: Path) -> list[str]:
    """Everything below the folder but folders and the manifest itself, as sorted relative names."""
    found = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    ]
    return sorted(name for name in found if name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Writes the manifest of a folder that nobody writes to any more, after all that it names is on the disk."""

    def settle(name: str) -> str:
        sync(folder / name)
        return _digest(folder / name)

    names = _names(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(settle, names))
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    write_synced(folder / MANIFEST, "".join(f"{d}  {name}\n" for d, name in zip(digests, names, strict=True)))
    sync(folder)


def damage(folder: Path, hashed: Callable[[str], bool] = lambda _: True) -> str:
    """What is wrong with a sealed folder, in a few words; `""` where every file is as it was.

    Names are checked of all files, hashes of those whose names `hashed` picks. Files whose names begin with a dot and
    that the manifest does not name are a desktop's and are passed over.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "is not a folder of its own"
    try:
        raw = (folder / MANIFEST).read_bytes()
        wanted = {name.decode(): digest.decode() for digest, name in LINE.findall(raw)}
        lines = "".join(f"{digest}  {name}\n" for name, digest in wanted.items())
        if lines.encode() != raw or not wanted:
            return f"{MANIFEST} is damaged"
        found = set(_names(folder))
        if missing := sorted(wanted.keys() - found):
            return f"{missing[0]} is missing"
        if surplus := sorted(name for name in found - wanted.keys() if not name.rpartition("/")[2].startswith(".")):
            return f"{surplus[0]} is not in {MANIFEST}"
        for name in wanted:
            if (folder / name).is_symlink() or not (folder / name).is_file():
                return f"{name} is not a plain file"
        names = [name for name in wanted if hashed(name)]
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda name: _digest(folder / name), names)
            changed = [name for name, digest in zip(names, digests, strict=True) if digest != wanted[name]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    return f"{changed[0]} has changed since it was written" if changed else ""
