"""Memory of the training step on a GPU by the compiler's account, which needs no GPU.

    python -m benchmarks.gpu_program [--batch=256] [--tiny]                        (requirements-gpu.txt)

Method: the steps of benchmarks/gpu_step.py, with the optimizer of configs/vit_bert.py:base, compiled for an
H100 (bfloat16, no rematerialisation, no dropout): once with attention by cuDNN, and once, the peer here, by
XLA, as for a GPU that is not NVIDIA's. "Resident" are state, frozen parameters and batch; the other columns
are the peak of the step's temporaries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.contenders import PROJECTION, SIZES, tower_configs
from benchmarks.flags import read_flags
from lit_jax.config import parse
from lit_jax.configs.vit_bert import get_config
from lit_jax.distributed.flags import set_flags
from lit_jax.planning.planner import abstract_step, traced
from lit_jax.training.train_step import TrainStep

DEMO = Path(__file__).parents[1] / "configs" / "demo"
H100, HOPPER = "NVIDIA H100 80GB HBM3", (9, 0)

# The description of a GPU that XLA reads, with the figures of an H100.
_GPU = """
platform_name: "CUDA"
device_description_str: "{name}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85029158912
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def main() -> None:
    args = read_flags(__doc__, batch=256, tiny=False)
    set_flags()
    # Else the plugin warns that it found no GPU.
    jax.config.update("jax_platforms", "cpu")
    names = (H100, "not NVIDIA's")
    print(f"{'':5} {'lock':4} {'resident':>10} {'cuDNN GiB':>10} {'XLA GiB':>10} {'ratio':>6}")
    for size in ("tiny",) if args.tiny else ("B/16", "L/16"):
        for lock in ("LU", "UU"):
            (resident, fused), (_, unfused) = (
                memory(size, lock, args.batch, gpus(1, name)) for name in names
            )
            columns = (f"{size_ / 2**30:10.2f}" for size_ in (resident, fused, unfused))
            print(f"{size:5} {lock:4}", *columns, f"{unfused / fused:6.2f}", flush=True)


def gpus(count: int, name: str = H100, capability: tuple[int, int] = HOPPER) -> list[Any]:
    """Return devices to compile for; they cannot compute."""
    major, minor = capability
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=_GPU.format(name=name, major=major, minor=minor),
        topology=f"1x1x{count}",
    ).devices


def memory(size: str, lock: str, batch_size: int, devices: Sequence[Any]) -> tuple[int, int]:
    """Return the resident bytes of one device before a step, and those of the temporaries."""
    step = step_of(size, lock, batch_size, devices)
    with jax.set_mesh(step.model.mesh):
        compiled = traced(step, step.abstract_batch(batch_size)).lower().compile()
    memory = compiled.memory_analysis()
    resident = memory.argument_size_in_bytes
    return resident, memory.peak_memory_in_bytes - resident


def step_of(size: str, lock: str, batch_size: int, devices: Sequence[Any]) -> TrainStep:
    """Return the step of a size of `contenders.SIZES`, in bfloat16."""
    raw = get_config("base")
    vit, bert = (config.to_diff_dict() for config in tower_configs(size, dropout=0.0))
    raw.model.image.model, raw.model.text.model = str(DEMO / "vit"), str(DEMO / "bert")
    raw.model.image.overrides, raw.model.text.overrides = vit, bert
    raw.model.image.projection, raw.model.projection_dim = "linear", PROJECTION
    raw.data.image_size = SIZES[size].pixels
    raw.data.max_text_length = SIZES[size].tokens
    raw.policy.lock, raw.remat, raw.batch_size = lock, "none", batch_size
    return abstract_step(parse(raw), devices)


if __name__ == "__main__":
    main()
