"""Settings of the process on the host: its memory, and devices that its CPU plays."""

import ctypes
import sys

from transformer_jax.errors import InputError

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


def simulate(devices: int) -> None:
    """Makes this process's CPU play so many devices.

    Raises:
        InputError: JAX has started with its own.
    """
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        raise InputError(f"--devices {devices}: JAX has started in this process with {jax.device_count()}.") from None
