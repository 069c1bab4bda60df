"""Settings of the process on the host: its memory, XLA's flags, what it keeps compiled, devices that its CPU plays."""

import contextlib
import ctypes
import os
import platform
import stat
import sys
from hashlib import blake2b
from pathlib import Path

from transformer_jax.errors import InputError

# glibc's mallopt: names from malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


FEW_CORES = 4


def cores() -> list[int]:
    """Those of the CPU that this process may use, by number where the system has numbers for them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def keep_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; whether it was told.

    XLA allocates one large buffer a step. Given back each time, every page of it faults in again. Only one arena can
    keep it, and the lock of that arena is what many threads then wait for, so where there are more than a few cores
    nothing is told: on 16 cores 60 steps of `dates` took 38 s with it and 19 s without, and with a GPU beside them more
    than 145 s and 46 s. On 2 cores it halves the system time.
    """
    if not sys.platform.startswith("linux") or len(cores()) > FEW_CORES:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**28))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def memory() -> int:
    """Bytes of memory that the machine has, 0 where it does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
    return os.sysconf(names[0]) * os.sysconf(names[1]) if known else 0


# What JAX's own page on GPUs advises (docs.jax.dev, "GPU performance tips"): exchanges between devices beside what is
# computed meanwhile, and XLA's own matrix products where they are the quicker ones.
FAST_ON_GPU = {"--xla_gpu_enable_latency_hiding_scheduler": "true", "--xla_gpu_triton_gemm_any": "true"}
# What makes a GPU's last bits differ from run to run: atomic additions, and kernels that are chosen by their time.
DETERMINISTIC = {"--xla_gpu_deterministic_ops": "true", "--xla_gpu_autotune_level": "0"}


def _set_flags(wanted: dict[str, str], why: str) -> None:
    """Gives XLA flags, before it starts, and says so; those that the user has set stay."""
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"{name}={value}" for name, value in wanted.items() if name not in given]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
        print(f"{why}: XLA_FLAGS={os.environ['XLA_FLAGS']!r}", file=sys.stderr)


def has_gpu() -> bool:
    """Whether JAX will find a GPU of NVIDIA, as far as can be told before it has started."""
    platforms = os.environ.get("JAX_PLATFORMS", "") or "cuda"
    return Path("/dev/nvidiactl").exists() and any(name in platforms.split(",") for name in ("cuda", "gpu"))


def prepare(deterministic: bool = False, keep: bool = True) -> None:
    """Settings of a process that trains, decodes or measures, before JAX has started.

    Args:
        deterministic: XLA adds and chooses in the same way each time. On a GPU scatters and reductions are then
            slower, and kernels may be; a CPU and a TPU do so anyway.
        keep: see `keep_programs`.
    """
    keep_memory()
    if has_gpu():
        _set_flags(FAST_ON_GPU, "for a GPU")
    if deterministic:
        _set_flags(DETERMINISTIC, "deterministic, and on a GPU slower for it")
    if keep and (problem := keep_programs()):
        print(problem, file=sys.stderr)


MOST_KEPT = 2**31  # bytes of compiled programs


def keep_programs() -> str:
    """Keeps compiled programs in the user's cache folder, so that the next process need not compile them again.

    They are code that will be run, so the folder is the user's alone. Machines that share it have folders of their own
    in it, as a program is for one kind of processor. What the user has set for JAX's own cache stays.

    Returns:
        Why they are not kept, nothing where they are.
    """
    import jax

    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return ""
    try:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer_jax"
        folder = own / _kind_of_processor()
        own.parent.mkdir(parents=True, exist_ok=True)
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return f"Compiled programs are not kept: {own} must be a folder that is yours alone (chmod 700)."
        folder.mkdir(mode=0o700, exist_ok=True)
        _thin_out(own)
    except (OSError, RuntimeError) as error:
        return f"Compiled programs are not kept: {' '.join(str(error).split())}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return ""


def _kind_of_processor() -> str:
    """A name for what code for this machine's processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return f"{platform.machine()}-{blake2b(''.join(facts).encode(), digest_size=8).hexdigest()}"


def _thin_out(folder: Path) -> None:
    """Deletes what was kept first until all of it is small enough."""
    kept = []
    for path in folder.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process may thin it out, too
            found = path.stat()
            kept.append((found.st_mtime, found.st_size, path))
    kept.sort()
    size = sum(each for _, each, _ in kept)
    for _, each, path in kept:
        if size <= MOST_KEPT:
            break
        path.unlink(missing_ok=True)
        size -= each


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
