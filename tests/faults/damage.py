"""Ways to damage a checkpoint: each file in each way, single bits, whole folders."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = tuple[str, Callable[[Path], None]]  # what it is, and the function that does it to a folder of checkpoints


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(checkpoints: Path) -> None:
        (checkpoints / name).write_bytes(change((checkpoints / name).read_bytes()))

    return act


def _flip(place: int, bit: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


def _copy(old: str, new: str) -> Callable[[Path], None]:
    return lambda checkpoints: shutil.copyfile(checkpoints / old, checkpoints / new) and None


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda raw: b"",
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "longer": lambda raw: raw + bytes(16),
    "zeros": lambda raw: bytes(len(raw)),
}


def files_of(unit: Path) -> list[str]:
    """The files of a checkpoint, as names from the folder of checkpoints on."""
    return sorted(path.relative_to(unit.parent).as_posix() for path in unit.rglob("*") if path.is_file())


def damages(checkpoints: Path, newest: str, older: str, flips: int, seed: int = 0) -> Iterator[Damage]:
    """Every damage to the newest checkpoint that is tried."""
    names = files_of(checkpoints / newest)
    for name in names:
        yield f"{name} deleted", lambda folder, name=name: (folder / name).unlink()
        if (checkpoints / name).stat().st_size:
            for how, change in CHANGES.items():
                yield f"{name} {how}", _rewrite(name, change)
        other = name.replace(newest, older, 1)
        if (checkpoints / other).exists() and (checkpoints / other).read_bytes() != (checkpoints / name).read_bytes():
            yield f"{name} from step {older}", _copy(other, name)
    rng, sizes = random.Random(seed), [(checkpoints / name).stat().st_size for name in names]
    for name in rng.choices(names, sizes, k=flips):
        place, bit = rng.randrange((checkpoints / name).stat().st_size), rng.randrange(8)
        yield f"bit {bit} of byte {place} of {name}", _rewrite(name, _flip(place, bit))

    def replaced(make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            shutil.rmtree(folder / newest)
            make(folder / newest, folder / older)

        return act

    yield "an empty folder", replaced(lambda new, old: new.mkdir())
    yield "a file in its place", replaced(lambda new, old: new.write_text("x"))
    yield "a link to another folder", replaced(lambda new, old: new.symlink_to("/etc"))
    yield "a link to the older one", replaced(lambda new, old: new.symlink_to(old))
    yield "the older one under its name", replaced(lambda new, old: shutil.copytree(old, new))
    yield "deleted", replaced(lambda new, old: None)
