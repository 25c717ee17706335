"""One training step: locked ViT-B/16 + BERT-base, 32 tokens, float32, AdamW. lit_jax against its two peers.

    python -m benchmarks.train_step [--batch=16] [--steps=5] [--flax-python=PATH] [--tiny]
                                                                                    (requirements-oracle.txt)

Contenders, each in a process of its own (benchmarks/contenders.py):
    lit_jax   from images: the locked tower computes in every step
    cached    lit_jax, when the batch has the locked tower's features (computed once, before training)
    PyTorch   VisionTextDualEncoderModel, image tower without gradient and in evaluation mode
    Flax      FlaxVisionTextDualEncoderModel of transformers 4.57.6, the same parameters trained. It needs an
              environment of its own, whose Python --flax-python names; without it this one is left out:
                  pip install transformers==4.57.6 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax

Method: the same shapes and kind of values, random weights, dropout of 0.1 in the text tower and the gradient
clipped to length 1 in all; lit_jax with its own optimizer, and in processes without PyTorch, as its users
have them. Two steps to warm up, then `steps` of each, in turn, on all cores. Prints median seconds on the
clock, spread (half the distance between quartiles), median seconds of processor time, the most memory the
process ever had, compiling included, and the ratios PyTorch / contender: above 1 the contender is faster, or
takes less memory.
"""

import sys

from benchmarks.contenders import Settings, compare
from benchmarks.flags import read_flags


def main() -> None:
    args = read_flags(__doc__, batch=16, steps=5, flax_python="", tiny=False)
    pythons = dict.fromkeys(("lit_jax", "cached", "PyTorch"), sys.executable)
    if args.flax_python:
        pythons["Flax"] = args.flax_python
    settings = Settings(batch=args.batch, size="tiny" if args.tiny else "B/16")
    results = compare(pythons, settings, args.steps)
    base = results["PyTorch"]
    print(
        f"{'':8} {'s a step':>14} {'pairs/s':>8} {'cpu s':>8} {'GiB':>6}   ratios: time, cpu, memory"
    )
    for name, (times, peak) in results.items():
        print(
            f"{name:8} {times.wall:8.3f} ±{times.spread:4.0%} {args.batch / times.wall:8.1f} "
            f"{times.cpu:8.3f} {peak:6.2f} {base.times.wall / times.wall:15.2f} "
            f"{base.times.cpu / times.cpu:6.2f} {base.peak / peak:6.2f}"
        )


if __name__ == "__main__":
    main()
