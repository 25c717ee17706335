"""A locked ViT-B/16 alone, against PyTorch's; reading of embeddings; time to the first step.

    python -m benchmarks.embed [--batch=32]        (needs requirements-oracle.txt)

Method: random weights, float32, all cores. Our tower, jitted and pooled by its first token, and PyTorch's
ViTModel in eval mode without gradient get the same batch, in turn, median of five after one warm-up. Prints
images/s, spread (half the distance between quartiles) and the ratios PyTorch / contender: above 1 it is
faster. Reading is random, one thread. The last line is the demo's train command from start to end, of one
step.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from benchmarks.flags import read_flags
from benchmarks.timing import in_turn
from lit_jax.distributed.flags import set_flags
from lit_jax.models.families import build_tower
from lit_jax.precomputed.format import MANIFEST, Embeddings, Header, ShardWriter, shard_counts

# Rows that are read.
EXAMPLES = 20_000
WIDTH = 768


def main() -> None:
    args = read_flags(__doc__, batch=32)
    set_flags()
    towers(args.batch)
    reading()
    first_step()


def towers(batch: int) -> None:
    config = transformers.ViTConfig()
    pixels = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    module = build_tower(config.to_dict(), pooling="cls", dtype="float32").clone(all_tokens=False)
    params = jax.jit(module.init)(jax.random.key(0), pixels[:1])
    apply = jax.jit(lambda params, x: module.apply(params, x).pooled)
    theirs = transformers.ViTModel(config).eval()
    channels_first = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def torch_forward():
        with torch.no_grad():
            theirs(channels_first)

    runs = {
        "lit_jax tower": lambda: jax.block_until_ready(apply(params, pixels)),
        "PyTorch tower": torch_forward,
    }
    times = in_turn(runs, repeats=5)
    base = times["PyTorch tower"]
    for name, of_contender in times.items():
        print(
            f"{name:16} {batch / of_contender.wall:9.1f} images/s ±{of_contender.spread:4.0%}   ratio "
            f"{base.wall / of_contender.wall:.2f}, of processor time {base.cpu / of_contender.cpu:.2f}"
        )


def reading() -> None:
    """Print the speed of reading random rows of embeddings."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        read = cache(folder, rng.normal(size=(EXAMPLES, 1, WIDTH)).astype(np.float32))
        order = rng.permutation(EXAMPLES)
        read[0]
        start, cpu = time.perf_counter(), time.process_time()
        for index in order:
            read[int(index)]
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(
            f"{'reading':16} {EXAMPLES / wall:9.0f} rows/s, {EXAMPLES / cpu:.0f} rows/s of CPU time"
        )


def cache(folder: Path, rows_NxKxP: np.ndarray) -> Embeddings:
    count, views, width = rows_NxKxP.shape
    header = Header(
        side="image",
        tower="",
        preprocessing="",
        data="",
        views=views,
        examples=count,
        width=width,
        dtype="float32",
        shard_size=count,
    )
    writer = ShardWriter(folder / header.shard_name(0))
    for rows_KxP in rows_NxKxP:
        writer.add(rows_KxP)
    writer.close(complete=True)
    manifest = dataclasses.asdict(header) | dataclasses.asdict(shard_counts(folder, header, 0))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Embeddings(folder)


def first_step() -> None:
    """Print the time of a whole command of one step and its checkpoint, without evaluations."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, "-m", "lit_jax.train", "--config=configs/vit_bert.py"),
            *(f"--workdir={workdir}", "--config.duration=1 step", "--config.log.every=1 step"),
            *("--config.schedule.warmup=0 steps", "--config.evals={}", "--config.report=none"),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        print(f"{'first step':16} {time.perf_counter() - start:9.1f} s")


if __name__ == "__main__":
    main()
