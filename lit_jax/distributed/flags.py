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
    # Only libtpu reads these flags. It ends the process when it meets an unknown flag.
    "LIBTPU_INIT_ARGS": {
        # Collectives overlap with computation that does not need their result yet. libtpu 0.0.42 does so by
        # default: a sharded train step compiled for v5e:4x4 is the same with and without these flags. The
        # flags guard against another default in a later version.
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_latency_hiding_scheduler": "true",
    },
    # XLA reads these flags on every platform; a flag of another platform has no effect.
    "XLA_FLAGS": {
        # On CPUs, operations are ordered for least memory, not for most concurrency, because there are far
        # fewer cores than concurrent operations. The step of a locked ViT-B/16 and BERT-base needs 0.2 GiB
        # less and takes no longer.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        # On GPUs, the gradients of one layer are summed over the devices while the gradients of the next
        # layer are computed. JAX's page on GPU performance recommends this flag.
        "xla_gpu_enable_latency_hiding_scheduler": "true",
    },
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add `FLAGS` to the variables of `environment`; flags that the user has set stay as they are."""
    for variable, flags in FLAGS.items():
        own = environment.get(variable, "")
        # XLA_FLAGS may also be the name of a file with flags. XLA then reads no flags from the variable.
        if own and not own.lstrip().startswith("-"):
            continue
        names = {flag.lstrip("-").partition("=")[0] for flag in own.split()}
        added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
        environment[variable] = " ".join([*own.split(), *added])


# Compiler options of a step with a locked image tower, by kind of device, which `set_flags` cannot know.
_STEP_OPTIONS = {
    # In this part of the memory on chip, the compiler keeps the values of 32 images of a ViT-B/16 (see
    # IMAGES_OF_KIND in models/chunks.py). On v5e the step would take longer.
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}


def step_options(
    device_kind: str, environment: MutableMapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the options of a step with a locked image tower, but for those that the user has set."""
    own = environment.get("LIBTPU_INIT_ARGS", "")
    options = _STEP_OPTIONS.get(device_kind, {})
    return {name: value for name, value in options.items() if name not in own}


# (required value, reason) of each JAX setting that would otherwise change what a run computes. The config
# does not record these settings, so a run with another value could not be repeated.
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
