"""Settings of the process on the host that make CPU steps faster."""

import ctypes
import sys

# glibc's mallopt: names from malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; whether it was told.

    XLA allocates one large buffer a step. Given back each time, every page of it faults in again: up to half of a step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**28))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)
