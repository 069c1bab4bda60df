"""One run in several processes: how they find each other, agree, and end together. One process is a job, too.

Process 0 speaks and writes the run's files; all of them compute, and all write checkpoints.
"""

import contextlib
import ctypes
import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import ParallelConfig
from transformer_jax.errors import InputError

# A process that has not been heard of for so long is dead, and the others end.
HEARTBEAT_SECONDS = 30
START_SECONDS = 300
LOST = 6  # exit status of a process that lost another one

Environment = Mapping[str, str]


def _listed(environment: Environment, *names: str) -> int:
    """Length of the first list with commas among these variables, 0 where there is none."""
    lists = [environment[name] for name in names if environment.get(name)]
    return len(lists[0].split(",")) if lists else 0


def _slurm(environment: Environment) -> int:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environment.get(name) for name in names):
        return 0
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])


def _tpu(environment: Environment) -> int:
    hosts = _listed(environment, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if not hosts and _found("libtpu") and not environment.get("TPU_SKIP_MDS_QUERY"):
        return 2  # a TPU VM, where JAX asks the metadata server how many there are; `import jax` sets that elsewhere
    return hosts * int(environment.get("MEGASCALE_NUM_SLICES") or 1)


# launcher: the number of processes that it started, from the variables that it sets; 0 where it did not
LAUNCHERS: dict[str, Callable[[Environment], int]] = {
    "Open MPI": lambda environment: int(environment.get("OMPI_COMM_WORLD_SIZE") or 0),
    "Slurm": _slurm,
    "TPU pod": _tpu,
    "Kubernetes": lambda environment: 2 if environment.get("JOB_COMPLETION_INDEX") and _found("kubernetes") else 0,
}


def _found(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def launcher(environment: Environment) -> str:
    """What started this process as one of several, `""` where nothing did."""
    for name, count in LAUNCHERS.items():
        try:
            if count(environment) > 1:
                return name
        except ValueError:
            continue
    return ""


def join(config: ParallelConfig) -> None:
    """Finds the other processes of the job, where there are any: those of the config, or those of a launcher.

    It must come before anything else of JAX. A process that dies ends the others within HEARTBEAT_SECONDS or so.

    Raises:
        InputError: the launcher does not say where the others are, or they do not come.
    """
    options: dict[str, Any] = {}
    found = launcher(os.environ)
    if config.coordinator:
        found = "the flags"
        options = dict(
            coordinator_address=config.coordinator,
            num_processes=config.num_processes,
            process_id=config.process_id,
            cluster_detection_method="deactivate",
        )
    elif found == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise InputError(
            "Open MPI 5 does not say where the first process is. Give --parallel.coordinator HOST:PORT, "
            "--parallel.num-processes $OMPI_COMM_WORLD_SIZE and --parallel.process-id $OMPI_COMM_WORLD_RANK."
        )
    if not found:
        return
    late = f"The job's other processes, started by {found}, did not come within {START_SECONDS} s."
    try:
        with speaking_for_aborts(lambda: late):
            jax.distributed.initialize(
                **options,
                initialization_timeout=START_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"The job's processes, started by {found}, did not find each other: {reason}") from None


def count() -> int:
    """Processes of the job."""
    return jax.process_count()


def number() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process speaks and writes."""
    return number() == 0


def wait(name: str) -> None:
    """Until all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def shared(text: str | None) -> str:
    """The first process's text, in all of them."""
    if count() == 1:
        assert text is not None
        return text
    data = np.frombuffer((text or "").encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(length, np.uint8)
    padded[: len(data)] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).decode()


def check_same(what: str, text: str) -> None:
    """Raises InputError where a process has another text than the first."""
    first = shared(text)
    agreed = np.asarray(gather(np.asarray(text == first))).reshape(-1)
    if not agreed.all():
        others = ", ".join(str(number) for number in np.flatnonzero(~agreed))
        raise InputError(f"{what} differs between processes: that of process {others} is not that of process 0.")


def gather(tree: Any) -> Any:
    """Arrays whole on every host: those of all processes, where they are split; one after the other, where not."""
    return multihost_utils.process_allgather(tree, tiled=True) if count() > 1 else jax.device_get(tree)


@functools.cache
def _largest() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(lambda votes: votes.max(), out_shardings=whole)


def vote(flag: bool) -> Any:
    """True where any process says so: the same in all of them, as a number that arrives later."""
    if count() == 1:
        return flag
    where, largest = _largest()
    shape = (jax.device_count(),)
    return largest(jax.make_array_from_callback(shape, where, lambda index: np.full(shape, flag)[index]))


def abandon(reason: str) -> NoReturn:
    """Ends a process that has lost another one, at once: nothing that waits for the others would ever come back."""
    os.write(2, f"transformer-jax: {reason}\n".encode())
    os._exit(LOST)


@contextlib.contextmanager
def speaking_for_aborts(reason: Callable[[], str]) -> Iterator[None]:
    """Within it, a process that JAX aborts says why and exits with LOST.

    JAX's watchdog aborts when heartbeats stop, from a thread of its own, so the handler of that signal is one of C.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: abandon(reason()))
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, before)


@contextlib.contextmanager
def together(newest: Callable[[], int | None]) -> Iterator[None]:
    """Within it, a process that loses another one says so and exits with LOST; `newest` is the step last saved."""

    def reason() -> str:
        step = newest()
        saved = "nothing was saved yet" if step is None else f"they go on from step {step}"
        return (
            f"process {number()} of {count()}: another process has ended or cannot be reached. Start all of them "
            f"again; {saved}."
        )

    if count() == 1:
        yield
        return
    with speaking_for_aborts(reason):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            abandon(f"{reason()} ({str(error).splitlines()[0][:200]})")
