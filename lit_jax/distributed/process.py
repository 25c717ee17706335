"""Process set-up: the one place where a command joins the other processes of its run, and leaves them."""

import contextlib
import ctypes
import functools
import logging
import os
import re
import sys
import time
from typing import Any

import jax

# JAX has no public name for whether it is in use already.
from jax._src import xla_bridge

from lit_jax.distributed.flags import check_settings, set_flags
from lit_jax.distributed.launchers import Place, find_place, idle_tasks
from lit_jax.distributed.roll_call import START_SECONDS, meet
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# After so many seconds without a sign of life from one process, JAX aborts all others (SIGABRT).
HEARTBEAT_SECONDS = 40
# Between the time-out and the abort lie a heartbeat and a poll of the coordinator.
_VERDICT_SECONDS = 5
# A shorter compilation leaves too little memory behind to be worth looking for.
COMPILE_SECONDS = 1.0

_number: int | None = None


def initialize() -> None:
    """Join the run's processes; call before anything touches a device.

    A process that is the only one may use JAX already, as in a notebook. If others do not come, this one says
    so within seconds, and raises GoneError after five minutes. If one dies or stops later, JAX's heartbeats
    end the others after `HEARTBEAT_SECONDS`.
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
            f"{place.count_from} says {place.count} processes, which must come together before anything uses "
            "JAX; start the command in a process of its own."
        )
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
        # `find_place` has looked already.
        cluster_detection_method="deactivate",
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def open_devices() -> None:
    """Raise UserError if JAX has no device of the kind that the environment asks for, or an odd setting."""
    check_settings()
    try:
        jax.local_devices()
    # AssertionError is what JAX raises where it knows the platform's name but has no plugin for it.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()).removesuffix(".") or "there is no plugin for it"
        raise UserError(
            f"JAX cannot use its devices, JAX_PLATFORMS={platforms!r} ({reason[:300]}); install JAX for "
            "them, or set JAX_PLATFORMS=cpu."
        ) from error


def _steady_simulated_devices() -> None:
    """Keep several simulated CPU devices from waiting for each other for ever.

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


# Cached, as a listener stays for the life of the process.
@functools.cache
def _give_memory_back_after_compiling() -> None:
    """Give what compiling leaves free back to the system before the program that was compiled takes its own.

    The C library would keep it: of the step of a locked ViT-B/16 and BERT-base 0.3 GiB.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    # Other C libraries than glibc have no such function.
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
    """Return, after a failure in one of several processes, only if all others are still there.

    If one is gone, collectives fail long before JAX knows why. JAX's client then ends this process by an
    abort that Python cannot see, and that tells launchers that the failure was not of its own making.
    """
    if _number is not None:
        time.sleep(HEARTBEAT_SECONDS + _VERDICT_SECONDS)


def leave(code: int) -> None:
    """End this process with an exit code if it is one of several; return if it is the only one.

    Python's own way out would wait for the others, which wait for this one in a collective.
    """
    if _number is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def number() -> int | None:
    """Return this process's number among several, None if it is the only one. Touches no device."""
    return _number


def is_primary() -> bool:
    """Return whether this process writes what is written once: logs, results, reports."""
    return jax.process_index() == 0
