"""Settings of the process on the host: its memory, and devices that its CPU plays."""

import ctypes
import os
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


def memory() -> int:
    """Bytes of memory that the machine has, 0 where it does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
    return os.sysconf(names[0]) * os.sysconf(names[1]) if known else 0


# What makes a GPU's last bits differ from run to run: atomic additions, and kernels that are chosen by their time.
DETERMINISTIC = {"--xla_gpu_deterministic_ops": "true", "--xla_gpu_autotune_level": "0"}


def be_deterministic() -> None:
    """Tells XLA, before it starts, to add and choose in the same way each time; flags that the user has set stay.

    On a GPU scatters and reductions are then slower, and kernels may be; a CPU and a TPU do so anyway.
    """
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"{name}={value}" for name, value in DETERMINISTIC.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    print(f"deterministic: XLA_FLAGS={os.environ['XLA_FLAGS']!r}; on a GPU steps are slower for it.", file=sys.stderr)


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
