"""Process set-up: the one place where a command joins the other processes of its run."""

import ctypes
import functools
import logging
import os
import re
from typing import Any

import jax

# The key-value store of a run's processes, and whether JAX is in use, have no public name.
from jax._src import distributed, xla_bridge

from lit_jax.distributed.flags import check_settings, set_flags
from lit_jax.distributed.launchers import Place, find_place, idle_tasks, split_address
from lit_jax.distributed.lifeline import START_SECONDS, Lifeline, assembling
from lit_jax.distributed.roll_call import meet
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# The second line of defence: a process that hangs as a whole keeps its connections open.
HEARTBEAT_SECONDS = 40
_TIME_OUTS: dict[str, Any] = {
    "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
    "initialization_timeout": 2 * START_SECONDS,  # behind `assembling`, which has a sentence
}
COMPILE_SECONDS = 1.0  # what a shorter compilation leaves in memory is not worth looking for

_lifeline: Lifeline | None = None


def initialize() -> None:
    """Join the run's processes; call before anything touches a device.

    `find_place` says which of them this one is. Where it is the only one, JAX may be in use already, as in a
    notebook. From here on, all processes end if one does; see lifeline.py. If some do not come at all, this
    one says so within seconds, and ends with 76 after five minutes.
    """
    check_settings()
    if distributed.global_state.client is not None:  # by an earlier command in this process
        if _lifeline is not None:
            _lifeline.begin()
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
    elif sentence := idle_tasks():
        log.warning(sentence)
    open_devices()


def _join(place: Place) -> None:
    global _lifeline
    meet(place)
    with assembling():
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",  # `find_place` has looked
            **_TIME_OUTS,
        )
    host = split_address(place.address_from, place.address)[0]
    _lifeline = Lifeline(place.index, distributed.global_state.client, host)


def open_devices() -> None:
    """Raise UserError if JAX has no device of the kind that the environment asks for, or an odd setting."""
    check_settings()
    try:
        jax.local_devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the latter where it knows the name, but has no plugin
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


@functools.cache  # a listener stays for the life of the process
def _give_memory_back_after_compiling() -> None:
    """Give what compiling leaves free back to the system before the program that was compiled takes its own.

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
    """Tell the other processes that this one ends with an exit code, and why.

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
