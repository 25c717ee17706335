"""Process set-up: the only place where a command joins the other processes of its run or leaves them."""

import atexit
import contextlib
import ctypes
import functools
import gc
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import jax

# JAX has no public function that says whether its backends are initialised.
from jax._src import xla_bridge

from lit_jax.distributed.flags import check_settings, set_flags
from lit_jax.distributed.launchers import Place, find_place, idle_tasks
from lit_jax.distributed.roll_call import START_SECONDS, meet
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# JAX aborts all other processes (SIGABRT) when one process sends no heartbeat for this long.
HEARTBEAT_SECONDS = 40
# The abort follows the time-out by up to one heartbeat and one poll of the coordinator.
_VERDICT_SECONDS = 5
# A shorter compilation leaves too little free memory behind to be worth a call of malloc_trim.
COMPILE_SECONDS = 1.0

# `leave` and `await_verdict` need the index when the backend may hang, so jax.process_index() cannot be used.
_number: int | None = None

# The time.monotonic() at which this process began, if it is a command's own.
_began: float | None = None


def begin_command() -> None:
    """Note that this process exists for one command, so that its start-up counts the imports, too."""
    global _began
    # Modules stay for ever. Python's collector looked through all of them again and again while the first
    # programs are traced, which took half a second.
    gc.freeze()
    # Linux counts the start of a process in ticks since boot. Other systems do not count the imports.
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        _began = time.monotonic() - age


def command_seconds() -> float:
    """Return the seconds since the process of a command began; 0 in any other process, as of a notebook."""
    return 0.0 if _began is None else time.monotonic() - _began


def initialize() -> None:
    """Join the run's processes; call this function before anything touches a device.

    A single process may have used JAX before, as in a notebook. If other processes do not come, this process
    warns within seconds and raises GoneError after five minutes. If a process dies or stops later, JAX's
    failure detector ends the others after `HEARTBEAT_SECONDS`.
    """
    global _number
    check_settings()
    # An earlier command in this process, or the user's own script, has joined the others.
    if jax.distributed.is_initialized():
        _number = jax.process_index() if jax.process_count() > 1 else None
        return
    place = find_place()
    is_used = xla_bridge.backends_are_initialized()
    if place and is_used:
        raise UserError(
            f"{place.count_from} asks for {place.count} processes, which must connect before anything uses "
            "JAX; run the command in a new process."
        )
    # XLA reads the flags once, when the first backend starts; later changes have no effect.
    if not is_used:
        set_flags()
        _steady_simulated_devices()
    _give_memory_back_after_compiling()
    if place:
        _join(place)
        _number = place.index
    elif sentence := idle_tasks():
        log.warning(sentence)
    open_devices()


def _join(place: Place) -> None:
    meet(place)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        # `find_place` has detected the cluster already.
        cluster_detection_method="deactivate",
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def open_devices() -> None:
    """Start the backend. Raise UserError if it has no such device or a setting would change results."""
    check_settings()
    try:
        jax.local_devices()
    # JAX raises AssertionError for a platform that it knows by name but has no plugin for.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()).removesuffix(".") or "there is no plugin for it"
        raise UserError(
            f"JAX cannot use its devices, JAX_PLATFORMS={platforms!r} ({reason[:300]}); install JAX for "
            "them, or set JAX_PLATFORMS=cpu."
        ) from error


def _steady_simulated_devices() -> None:
    """Keep several simulated CPU devices from a deadlock.

    XLA's CPU client starts one thread for each device. A device may wait in several collectives at once, and
    with asynchronous dispatch in the collectives of two steps. Devices that get no thread then never arrive.
    The client takes the number of threads from NPROC if that variable is set.
    """
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    configured: Any = jax.config.values["jax_num_cpu_devices"]
    devices = max(configured, int(flag[1]) if flag else 1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(32 * devices))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


# The cache makes a second call do nothing: JAX keeps a listener for the life of the process.
@functools.cache
def _give_memory_back_after_compiling() -> None:
    """Return the memory that a compilation frees to the system before the compiled program allocates its own.

    The C library would keep that memory: 0.3 GiB for the step of a locked ViT-B/16 and BERT-base.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    # Only glibc has malloc_trim.
    if give_back is None:
        return

    def after(event: str, duration_secs: float, **_: Any) -> None:
        if (
            event == "/jax/core/compile/backend_compile_duration"
            and duration_secs >= COMPILE_SECONDS
        ):
            give_back(0)

    jax.monitoring.register_event_duration_secs_listener(after)


def await_verdict() -> None:
    """Wait, after a failure in one of several processes, for JAX's failure detector to decide.

    If another process is gone, collectives fail long before JAX knows the reason. JAX's client then ends this
    process by an abort, which Python cannot catch and which tells launchers that another process failed
    first. The function returns only if all other processes are still there.
    """
    if _number is not None:
        time.sleep(HEARTBEAT_SECONDS + _VERDICT_SECONDS)


def leave(code: int) -> None:
    """End this process with an exit code if it is one of several; return if it is the only one.

    Python's normal exit would wait for the other processes, which wait for this process in a collective.
    """
    if _number is not None:
        _exit_at_once(code)


def end_command(code: int) -> NoReturn:
    """End this process, which exists for one command that is done, with an exit code.

    Python's normal exit takes modules and arrays apart for a second or more, in which nothing else happens.
    """
    # One of several processes has to wait for the others.
    if _number is not None:
        sys.exit(code)
    # Libraries close what they have open, such as a run of W&B, and temporary folders are removed.
    atexit._run_exitfuncs()
    _exit_at_once(code)


def _exit_at_once(code: int) -> NoReturn:
    # os._exit skips the flush of buffered output, which may hold an error message.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def number() -> int | None:
    """Return this process's index among several, None if it is the only one. This call touches no device."""
    return _number


def is_primary() -> bool:
    """Return whether this process writes what is written once: logs, results, reports."""
    return jax.process_index() == 0
