"""Model FLOPs utilisation of the training step on one GPU, bfloat16, against compiled PyTorch.

    python -m benchmarks.gpu_step [--batch=256] [--steps=20] [--peak-tflops=989] [--tiny]
                                                       (requirements-gpu.txt, requirements-oracle.txt)

Towers: ViT-B/16 and ViT-L/16 with a BERT of the same size, 32 tokens, image tower locked (LU) and unlocked
(UU). The steps are those of benchmarks/contenders.py.

Method: random weights, AdamW on float32 masters, clipped gradient, bfloat16 computation (PyTorch: autocast,
torch.compile and scaled_dot_product_attention), no dropout on either side: with it, PyTorch's fused attention
and ours do different work. Each contender in a process of its own, one after the other, since each takes the
memory of the GPU; two steps to warm up, then the median of `steps`.
The model FLOPs of a step are two for each multiplication in dense layers and attention, and for the backward
pass of a tower that trains twice that again; normalisation, activations, projections and the loss are not
counted. MFU is these FLOPs a second over --peak-tflops, the vendor's figure for dense bfloat16 (H100 and H200
SXM 989, A100 312). Prints pairs/s, spread (half the distance between quartiles), MFU, and the ratio of
pairs/s to PyTorch's.
"""

import dataclasses
import sys

from benchmarks.contenders import SIZES, Settings, compare
from benchmarks.flags import read_flags


def main() -> None:
    args = read_flags(__doc__, batch=256, steps=20, peak_tflops=989.0, tiny=False)
    common = Settings(
        batch=args.batch,
        dtype="bfloat16",
        dropout=0.0,
        device="cpu" if args.tiny else "cuda",
    )
    print(f"{'':5} {'lock':4} {'':8} {'pairs/s':>14} {'MFU':>6}  ratio to PyTorch")
    for size in ("tiny",) if args.tiny else ("B/16", "L/16"):
        for lock in ("LU", "UU"):
            settings = dataclasses.replace(common, size=size, lock=lock)
            times = {
                name: compare({name: sys.executable}, settings, args.steps)[name].times
                for name in ("lit_jax", "PyTorch")
            }
            for name, of_contender in times.items():
                rate = args.batch / of_contender.wall
                mfu = rate * flops_a_pair(size, lock) / (args.peak_tflops * 1e12)
                ratio = times["PyTorch"].wall / of_contender.wall
                print(
                    f"{size:5} {lock:4} {name:8} {rate:8.1f} ±{of_contender.spread:4.0%} "
                    f"{mfu:6.1%} {ratio:18.2f}",
                    flush=True,
                )


def flops_a_pair(size: str, lock: str) -> float:
    """Return the FLOPs of one image with its text, as the docstring of this file counts them."""
    tower_size = SIZES[size]

    def tower(length: int) -> int:
        # Four kernels of attention, and two of the MLP that are four times as large.
        dense = length * 12 * tower_size.width**2
        attention = 2 * length**2 * tower_size.width
        return 2 * tower_size.depth * (dense + attention)

    patches = (tower_size.pixels // 16) ** 2
    image = tower(patches + 1) + 2 * patches * (16 * 16 * 3) * tower_size.width
    return (3 if lock == "UU" else 1) * image + 3 * tower(tower_size.tokens)


if __name__ == "__main__":
    main()
