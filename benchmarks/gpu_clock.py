"""The planner's account of a training step on one GPU against the step itself: FLOPs, time and memory.

    python -m benchmarks.gpu_clock [--batch=256] [--steps=20] [--peak-tflops=989] [--tiny]
                                                                                   (requirements-gpu.txt)

Method: the steps of benchmarks/gpu_program.py, compiled and run on the first device, with random parameters
and a batch of zeros. "bound" is the time that all matrix products of the step need at --peak-tflops, as
`lit_jax.plan` counts them: every pass of a precision, and recomputation. "time" is the median of `steps`
after one to warm up. The memory is the peak of the step: by the compiler's account, and as the device counted
it; a CPU counts nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.flags import read_flags
from benchmarks.gpu_program import step_of
from benchmarks.timing import in_turn
from lit_jax.distributed.flags import set_flags
from lit_jax.planning.planner import step_flops, traced


def main() -> None:
    args = read_flags(__doc__, batch=256, steps=20, peak_tflops=989.0, tiny=False)
    set_flags()
    print(f"{'':5} {'lock':4} {'bound, ms':>10} {'time, ms':>10} {'share':>6} {'plan GiB':>9} GiB")
    for size in ("tiny",) if args.tiny else ("B/16", "L/16"):
        for lock in ("LU", "UU"):
            figures = measure(size, lock, args.batch, args.steps)
            flops, seconds, planned, counted = figures
            bound = flops / (args.peak_tflops * 1e12)
            print(
                f"{size:5} {lock:4} {1e3 * bound:10.2f} {1e3 * seconds:10.2f} {bound / seconds:6.1%} "
                f"{planned / 2**30:9.2f} {counted / 2**30:.2f}",
                flush=True,
            )


def measure(size: str, lock: str, batch_size: int, steps: int) -> tuple[int, float, int, int]:
    """Return FLOPs and seconds of a step, and the bytes of its peak by the compiler and by the device."""
    device = jax.devices()[0]
    step = step_of(size, lock, batch_size, [device])
    batch = step.abstract_batch(batch_size)
    with jax.set_mesh(step.model.mesh):
        compiled = traced(step, batch).lower().compile()
        arguments = [step.abstract_state(), step.abstract_frozen(batch), batch]
        state, frozen, rows = (jax.tree.map(_array, tree) for tree in arguments)

        def run() -> None:
            nonlocal state
            # The step takes over the buffers of its state.
            state, metrics = compiled(state, frozen, rows)
            jax.block_until_ready((state, metrics))

        seconds = in_turn({"step": run}, steps, uncounted=1)["step"].wall
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    flops = step_flops(step, batch)
    return flops, seconds, compiled.memory_analysis().peak_memory_in_bytes, counted


def _array(abstract: Any) -> jax.Array:
    """Return an array of this shape: small random numbers, or zeros for integers."""
    if not jnp.issubdtype(abstract.dtype, jnp.floating):
        return jax.device_put(jnp.zeros(abstract.shape, abstract.dtype), abstract.sharding)
    # Second moments are not negative.
    drawn = 0.02 * jnp.abs(jax.random.normal(jax.random.key(0), abstract.shape))
    return jax.device_put(drawn.astype(abstract.dtype), abstract.sharding)


if __name__ == "__main__":
    main()
