"""Ranks of N images among N texts and back, against the products of matrices that they need.

    python -m benchmarks.retrieval [--counts=20000,100000] [--widths=64,512] [--tiny]

Data: random embeddings; each text is its image's with noise, the same for all contenders.

Method: lit_jax's ranks (all steps, from NumPy arrays to NumPy arrays, one CPU device), once in a process of
its own; the second or so that it compiles is part of it. The peer is NumPy: the same products in blocks of
1024 x 1024, of which nothing is counted; at most 16384 x 16384 of them are computed, and the seconds of all
extrapolated. Prints seconds on the clock and of processor time, the ratios NumPy / lit_jax of both, the most
memory that the process ever held, embeddings included (2 N widths of 4 bytes), GiB, and what the whole
matrix of scores would take; then the temporary memory that the compiler states for a million by a million
in one program, MiB. `taskset -c 0` and OPENBLAS_NUM_THREADS=1 before the command measure one core.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flags import read_flags
from benchmarks.timing import Sample, in_own_process, once, peak_memory
from lit_jax.config import MeshConfig
from lit_jax.distributed.flags import set_flags
from lit_jax.distributed.mesh import make_mesh
from lit_jax.evals.ranks import BLOCK, count_ahead, ranks

MILLION = 977 * BLOCK
MOST = 16 * BLOCK  # of NumPy


def main() -> None:
    args = read_flags(__doc__, counts="20000,100000", widths="64,512", tiny=False, only="")
    set_flags()
    if args.only:
        print(json.dumps(measure(*map(int, args.only.split(",")))))
        return
    widths = [int(width) for width in args.widths.split(",")]
    print(f"{'':16} {'s':>8} {'cpu s':>8} {'ratio':>6} {'of cpu':>6} {'GiB':>6} {'matrix':>7}")
    for count in [3000] if args.tiny else map(int, args.counts.split(",")):
        for width in widths:
            *times, gib = in_own_process("benchmarks.retrieval", f"--only={count},{width}")
            products = np.array(numpy_products(*embeddings(count, width)))
            ratios = "{:6.2f} {:6.2f}".format(*products / times)
            seconds = "{:8.1f} {:8.1f}".format(*times)
            name = f"{count} of {width}"
            print(f"{name:16} {seconds} {ratios} {gib:6.2f} {count**2 / 2**28:7.2f}", flush=True)
    for width in widths:
        print(f"a million of {width}: {temporary_memory(width):.0f} MiB of temporary memory")


def measure(count: int, width: int) -> tuple[float, float, float]:
    """Seconds, processor seconds and GiB of all ranks."""
    images, texts = embeddings(count, width)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return *once(partial(ranks, images, texts, np.arange(count), mesh)), peak_memory()


def embeddings(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images, noise = random.standard_normal((2, count, width), np.float32)
    return images, images + noise


def numpy_products(images: np.ndarray, texts: np.ndarray) -> Sample:
    def run() -> None:
        for i in range(0, some, BLOCK):
            for j in range(0, some, BLOCK):
                np.matmul(images[i : min(i + BLOCK, some)], texts[j : min(j + BLOCK, some)].T)

    some = min(len(images), MOST)
    parts = (len(images) / some) ** 2
    sample = once(run)
    return Sample(sample.wall * parts, sample.cpu * parts)


def temporary_memory(width: int) -> float:
    """MiB beside embeddings and counts, in a program for a million images and texts at once."""
    rows = jax.ShapeDtypeStruct((MILLION, width), jnp.float32)
    scores = jax.ShapeDtypeStruct((MILLION,), jnp.float32)
    index = jax.ShapeDtypeStruct((MILLION,), jnp.int32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    sides = (rows, scores, index) * 2
    memory = count_ahead.lower(*sides, mesh=mesh, block=BLOCK).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
