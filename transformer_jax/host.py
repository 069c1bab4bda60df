"""Settings of the process on the host: its memory, and devices that its CPU plays."""

import ctypes
import os
import sys

from transformer_jax.errors import InputError

# glibc's mallopt: names from malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


FEW_CORES = 4


def keep_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; whether it was told.

    XLA allocates one large buffer a step. Given back each time, every page of it faults in again. Only one arena can
    keep it, and the lock of that arena is what many threads then wait for, so where there are more than a few cores
    nothing is told: on 16 cores 60 steps of `dates` took 38 s with it and 19 s without, and with a GPU beside them more
    than 145 s and 46 s. On 2 cores it halves the system time.
    """
    if not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) > FEW_CORES:
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
