"""The compiler flags that every command sets before JAX starts; the user's own settings win, flag by flag.

To try another value, set it in the environment: LIBTPU_INIT_ARGS='--xla_tpu_scoped_vmem_limit_kib=65536'.
What is worth keeping belongs here, with the reason.
"""

import os
from collections.abc import MutableMapping

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
    """Adds `FLAGS` to the variables, but for flags that are there already."""
    for variable, flags in FLAGS.items():
        own = environment.get(variable, "")
        if own and not own.lstrip().startswith("-"):
            continue  # XLA_FLAGS may also name a file, which then holds all of them
        names = {flag.lstrip("-").partition("=")[0] for flag in own.split()}
        added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
        environment[variable] = " ".join([*own.split(), *added])
