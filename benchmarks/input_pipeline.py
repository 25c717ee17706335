"""Images per second of the input pipeline, against the least that decoding and resizing takes.

    python -m benchmarks.input_pipeline [--images=256] [--batch=32] [--repeats=5] [--tiny]

Data: JPEGs of 512 x 384 pixels, quality 90, smooth colours with fine noise, and a caption each, made in a
temporary folder. Both give 224 x 224 images. Each file is listed many times, as often as makes a data set of
usual size: to shuffle a few hundred numbers takes Grain longer than to shuffle a million.

Method: the peer is a loop in one thread that opens a file with Pillow, decodes it to RGB, cuts out a random
box of at least half of the area and resizes it: no caption, no batch. "whole loop" makes of that what a
training step takes: the pixels stacked, and token ids by one call of the tokenizer for each batch; its
captions lie ready. lit_jax's TrainStream also shuffles, reads each caption from its file and replaces bad
samples: on one thread of this process, and in one and two worker processes of one thread, from which batches
come through shared memory. Batches that were read ahead are not measured at either end: before the clock
starts, as many are taken as can lie ready. In turn, `repeats` times `images` rows. Prints median images/s on
the clock, spread (half the distance between quartiles), and two ratios to the loop: of images/s, and of
images per second of processor time, over all processes: what a core is worth, on a busy machine too.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.flags import read_flags
from benchmarks.timing import Sample, Times
from lit_jax.config import DataConfig, SourceConfig
from lit_jax.data.image import random_box
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.loader import ImagePreprocessor, PairPreprocessor, TextPreprocessor, TrainStream
from lit_jax.data.sources import CAPTIONS_FILE, open_source
from lit_jax.data.text import load_tokenizer

DEMO = Path(__file__).parents[1] / "configs" / "demo"
SIZE = 224
MIN_AREA = 0.5
EXAMPLES = 1 << 18
CAPTION = "a photo of the number forty two"
# Batches ahead of the reader, for each worker: its thread's, the one that it sends, one in the queue and two
# on this side; the sixth is under way.
READ_AHEAD = 6


def main() -> None:
    args = read_flags(__doc__, images=256, batch=32, repeats=5, tiny=False)
    images, batch = (4, 2) if args.tiny else (args.images, args.batch)
    images -= images % batch
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as open_streams:
        folder = Path(name)
        make_data(folder, images, EXAMPLES)
        runs: dict[str, Callable[[], Sample]] = {
            "loop": functools.partial(sample, loop(folder, images)),
            "whole loop": functools.partial(sample, whole_loop(folder, images, batch)),
        }
        for workers in (0, 1) if args.tiny else (0, 1, 2):
            stream = open_stream(folder, batch, workers)
            open_streams.callback(stream.close)
            runs[f"{workers} workers"] = functools.partial(
                sample_stream, stream, images // batch, ahead=READ_AHEAD * max(workers, 1)
            )
        # Not `in_turn`, which knows nothing of worker processes.
        samples: dict[str, list[Sample]] = {run: [] for run in runs}
        for _ in range(args.repeats + 1):
            for run, take in runs.items():
                samples[run].append(take())
    base = Times(tuple(samples["loop"][1:]))
    print(f"{'':10}  images/s         ratio  ratio of processor time")
    for run, of_run in samples.items():
        # The first sample warms up.
        times = Times(tuple(of_run[1:]))
        print(
            f"{run:10} {images / times.wall:9.1f} ±{times.spread:4.0%} {base.wall / times.wall:8.2f} "
            f"{base.cpu / times.cpu:12.2f}"
        )


def make_data(folder: Path, count: int, examples: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + random.normal(0, 6, smooth.shape)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i}.jpg", quality=90)
    with (folder / CAPTIONS_FILE).open("w") as captions:
        for i in range(examples):
            row = {"image": f"{i % count}.jpg", "caption": CAPTION}
            captions.write(json.dumps(row) + "\n")


def loop(folder: Path, count: int) -> Callable[[], None]:
    random = np.random.default_rng(0)

    def run() -> None:
        for i in range(count):
            read(folder / f"{i}.jpg", random)

    return run


def whole_loop(folder: Path, count: int, batch: int) -> Callable[[], None]:
    random = np.random.default_rng(0)
    tokenizer = load_tokenizer(DEMO / "bert", max_length=32)

    def run() -> None:
        for start in range(0, count, batch):
            np.stack([read(folder / f"{start + i}.jpg", random) for i in range(batch)])
            captions = [CAPTION] * batch
            tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")

    return run


def read(file: Path, random: np.random.Generator) -> np.ndarray:
    """Return the pixels of a file, uint8 HxWx3, cut and resized."""
    with Image.open(file) as image:
        box = random_box(image.size, MIN_AREA, random)
        picture = image.convert("RGB")
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def open_stream(folder: Path, batch: int, workers: int) -> TrainStream:
    transform = load_image_transform(DEMO / "vit", image_size=SIZE, crop_min_area=MIN_AREA)
    return TrainStream(
        open_source(SourceConfig(path=str(folder), group_captions=False)),
        PairPreprocessor(
            ImagePreprocessor(transform),
            TextPreprocessor(load_tokenizer(DEMO / "bert", max_length=32)),
        ),
        config=DataConfig(workers=workers, threads=1),
        seed=0,
        batch_size=batch,
        process_index=0,
        process_count=1,
    )


def sample_stream(stream: TrainStream, count: int, ahead: int) -> Sample:
    """Return the times of `count` batches, after those that lay ready."""
    drain(stream, ahead)
    taken = sample(lambda: drain(stream, count))
    # The workers read ahead, which would disturb the next measurement.
    wait_until_idle()
    return taken


def drain(stream: TrainStream, count: int) -> None:
    for _ in itertools.islice(stream, count):
        pass


def wait_until_idle() -> None:
    while True:
        before = processor_time()
        time.sleep(0.3)
        if processor_time() - before < 0.02:
            return


def sample(call: Callable[[], object]) -> Sample:
    """Return the times of one call, with the processor time of worker processes."""
    cpu, wall = processor_time(), time.perf_counter()
    call()
    return Sample(time.perf_counter() - wall, processor_time() - cpu)


def processor_time() -> float:
    """Return the seconds that this process and, on Linux, its workers have computed."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        # utime and stime, proc(5).
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
