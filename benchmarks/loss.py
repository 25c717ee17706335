"""The softmax loss and its gradients alone: dense, blockwise, and PyTorch's as open_clip computes it.

    python -m benchmarks.loss [--batches=512,...] [--width=512] [--steps=5]   (needs requirements-oracle.txt)

Method: one CPU device, all cores, float32. Each figure comes from a process of its own: value and
gradients of both embeddings and the scale, one warm-up, then the fastest of `steps` in seconds, and the
least CPU seconds of one, which a busy machine disturbs less; the memory is what that process has held at
most (its maximal resident set) above what it held before the warm-up. Prints a line a batch, and the
ratios PyTorch / ours of the seconds: above 1 ours is faster.
"""

import argparse
import json

import numpy as np

from benchmarks.timing import in_own_process, once, peak_memory

IMPLEMENTATIONS = ("dense", "blockwise", "PyTorch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="measure this one, here")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.only:
        print(json.dumps(measure(args.only, batches[0], args.width, args.steps)))
        return
    print(
        f"{'batch':>7}",
        *(f"{implementation:>9} s {'CPU s':>8} {'MiB':>6}" for implementation in IMPLEMENTATIONS),
        "dense x blockwise x",
    )
    for batch in batches:
        shape = f"--batches={batch}", f"--width={args.width}", f"--steps={args.steps}"
        figures = [
            in_own_process("benchmarks.loss", f"--only={implementation}", *shape)
            for implementation in IMPLEMENTATIONS
        ]
        columns = ("{:11.4f} {:8.4f} {:6.0f}".format(*figure) for figure in figures)
        ratios = (f"{figures[2][0] / ours[0]:7.2f}" for ours in figures[:2])
        print(f"{batch:7}", *columns, *ratios, flush=True)


def measure(implementation: str, batch: int, width: int, steps: int) -> tuple[float, ...]:
    """Seconds, CPU seconds and MiB."""
    rng = np.random.default_rng(0)
    z_2xBxD = rng.normal(size=(2, batch, width)).astype(np.float32)
    z_2xBxD /= np.linalg.norm(z_2xBxD, axis=-1, keepdims=True)
    run = (torch_loss if implementation == "PyTorch" else lit_jax_loss)(implementation, *z_2xBxD)
    before = peak_memory()
    run()
    wall, cpu = zip(*(once(run) for _ in range(steps)), strict=True)
    return min(wall), min(cpu), 1024 * (peak_memory() - before)


def lit_jax_loss(implementation, zimg, ztxt):
    import jax
    import jax.numpy as jnp

    from lit_jax.distributed.flags import set_flags
    from lit_jax.training.losses import make_loss

    set_flags()
    gradients = jax.value_and_grad(
        make_loss("softmax", implementation=implementation), argnums=(0, 1, 2)
    )
    args = jnp.asarray(zimg), jnp.asarray(ztxt), jnp.float32(2.6592)
    compiled = jax.jit(gradients).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def torch_loss(implementation, zimg, ztxt):
    import torch

    del implementation
    arrays = zimg, ztxt, np.float32(2.6592)
    zimg, ztxt, scale = (torch.tensor(x, requires_grad=True) for x in arrays)
    labels = torch.arange(len(zimg))

    def run():
        logits = scale.exp() * zimg @ ztxt.T
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        return loss, torch.autograd.grad(loss, (zimg, ztxt, scale))

    return run


if __name__ == "__main__":
    main()
