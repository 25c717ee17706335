"""Process set-up: the one place where a command joins the other processes of its run."""

import ctypes
import os
import re
from typing import Any

import jax
from jax._src import distributed  # the key-value store of a run's processes has no public name

from lit_jax.distributed.flags import set_flags
from lit_jax.distributed.lifeline import START_SECONDS, Lifeline, assembling
from lit_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The second line of defence: a process that hangs as a whole keeps its connections open.
HEARTBEAT_SECONDS = 40
_TIME_OUTS: dict[str, Any] = {
    "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
    "initialization_timeout": 2 * START_SECONDS,  # behind `assembling`, which has a sentence
}
COMPILE_SECONDS = 1.0  # what a shorter compilation leaves in memory is not worth looking for

_lifeline: Lifeline | None = None


def initialize() -> None:
    """Joins the run's processes; call before anything touches a device.

    Connects to JAX_COORDINATOR_ADDRESS (host:port) as number JAX_PROCESS_ID of JAX_NUM_PROCESSES if these are
    in the environment. Else JAX looks for TPU slices, Slurm, Open MPI or Kubernetes job; if it finds
    none, this process is the only one. From here on, all end if one does; see lifeline.py. If some do not
    come at all, this process ends with 76 after five minutes.
    """
    set_flags()
    _steady_simulated_devices()
    _give_memory_back_after_compiling()
    with assembling():
        _join()
    joined = distributed.global_state
    if joined.num_processes > 1:
        global _lifeline
        host = (joined.coordinator_address or "").rpartition(":")[0].strip("[]")
        _lifeline = Lifeline(joined.process_id, joined.client, host)


def _join() -> None:
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given:
        if missing := set(_VARIABLES) - set(given):
            raise UserError(
                f"{' and '.join(given)} set without {' and '.join(sorted(missing))}; set all three or none."
            )
        address, count, index = (given[name] for name in _VARIABLES)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"JAX_PROCESS_ID={index} is no number from 0 to below JAX_NUM_PROCESSES={count}; correct it."
            )
        jax.distributed.initialize(address, int(count), int(index), **_TIME_OUTS)
        return
    try:
        jax.distributed.initialize(**_TIME_OUTS)
    except ValueError as error:
        if "coordinator_address" not in str(error):  # what JAX says where it finds no cluster
            raise


def _steady_simulated_devices() -> None:
    """Keeps several simulated CPU devices from waiting for each other for ever.

    XLA's CPU client starts one thread a device, but a device waits in several collectives at once, and
    in those of two steps when dispatch is asynchronous: then devices without a thread never arrive.
    NPROC is what the client takes for the number of threads if it is set.
    """
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    configured: Any = jax.config.values["jax_num_cpu_devices"]
    devices = max(configured, int(flag[1]) if flag else 1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(32 * devices))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _give_memory_back_after_compiling() -> None:
    """What compiling leaves free goes back to the system before the program that was compiled takes its own.

    The C library would keep it: of the step of a locked ViT-B/16 and BERT-base 0.3 GiB.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is None:  # not glibc
        return

    def after(event: str, duration_secs: float, **_: Any) -> None:
        if (
            event == "/jax/core/compile/backend_compile_duration"
            and duration_secs >= COMPILE_SECONDS
        ):
            give_back(0)

    jax.monitoring.register_event_duration_secs_listener(after)


def end(code: int, sentence: str = "", details: str = "") -> None:
    """Tells the other processes that this one ends with an exit code, and why.

    `details`, a traceback, are printed unless another process turns out to be the cause.

    With several processes it returns only where others may go on (0 and 75): the others end with the same
    code, and none of them waits for another.
    """
    if _lifeline is not None:
        _lifeline.end(code, sentence, details)


def number() -> int | None:
    """This process's number among several, None if it is the only one. Touches no device."""
    joined = distributed.global_state
    return joined.process_id if joined.num_processes > 1 else None


def is_primary() -> bool:
    """Whether this process writes what is written once: logs, results, reports."""
    return jax.process_index() == 0
