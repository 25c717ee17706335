"""The compiler flags that every command sets before JAX starts; the user's own settings win, flag by flag.

To try another value, set it in the environment: LIBTPU_INIT_ARGS='--xla_tpu_scoped_vmem_limit_kib=65536'. A
flag that is worth keeping belongs here, with the reason.
"""

import os
from collections.abc import MutableMapping
from typing import Any

import jax

from lit_jax.errors import UserError

FLAGS = {
    # libtpu reads these, and ends the process at one that it does not know.
    "LIBTPU_INIT_ARGS": {
        # Collectives run beside the computation that does not need them yet. So does the default of libtpu
        # 0.0.42: compiled for v5e:4x4, a sharded train step comes out the same. Written down so
        # that it stays so.
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_latency_hiding_scheduler": "true",
    },
    # Every XLA reads these; the ones for GPUs or CPUs mean nothing to the others.
    "XLA_FLAGS": {
        # On CPUs, operations in the order that needs least memory, not the one in which most can run at once:
        # there are far fewer cores than that. The step of a locked ViT-B/16 and BERT-base needs 0.2 GiB less,
        # and takes no longer.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        # The same for GPUs: gradients of one layer are summed over the devices while those of the next are
        # computed. Recommended by JAX's page on GPU performance.
        "xla_gpu_enable_latency_hiding_scheduler": "true",
    },
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add `FLAGS` to the variables, but for flags that are there already."""
    for variable, flags in FLAGS.items():
        own = environment.get(variable, "")
        # XLA_FLAGS may also name a file, which then holds all of them.
        if own and not own.lstrip().startswith("-"):
            continue
        names = {flag.lstrip("-").partition("=")[0] for flag in own.split()}
        added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
        environment[variable] = " ".join([*own.split(), *added])


# (needed value, reason) for the settings of JAX under which a run would not compute what its config says.
_FIXED: dict[str, tuple[Any, str]] = {
    "jax_enable_x64": (False, "a run computes in float32 or bfloat16"),
    "jax_disable_jit": (False, "a step is compiled as a whole"),
    "jax_random_seed_offset": (0, "config.seed is what changes the random numbers"),
    "jax_default_prng_impl": ("threefry2x32", "a run goes on with the same random numbers"),
    "jax_threefry_partitionable": (True, "random numbers are the same on any number of devices"),
}


def check_settings() -> None:
    """Raise UserError for a setting of JAX that would change what a run computes."""
    for name, (right, why) in _FIXED.items():
        if (value := jax.config.values[name]) != right:
            raise UserError(
                f"{name.upper()}={value} is set in the environment or in this process, but {why}; unset it, "
                f"or set {name.upper()}={right}."
            )
