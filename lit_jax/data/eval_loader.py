"""Batches for evaluation: each image once, in order."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.image import ImageTransform
from lit_jax.data.loader import Batch, local_rows

log = logging.getLogger(__name__)

# Threads suffice without worker processes: Pillow decodes and resizes outside the GIL.
_THREADS = 8


def eval_batches(
    source: Source,
    image_transform: ImageTransform,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    positions: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield this process's share of the images at `positions` of the source (None: all), once and in order.

    Every process yields the same number of batches of the same size: the encoder is a collective program.

    Args:
        batch_size: rows over all processes.

    Yields:
        'pixel_values' uint8 (rows, height, width, 3), and 'index' int32 (rows): the image's place among
        `positions`, or -1 for padding and for an image that cannot be decoded (its key is logged).
    """
    rows = local_rows(batch_size, process_count)
    positions = range(len(source)) if positions is None else positions
    load = _LoadImages(source, positions, image_transform, rows, process_index, process_count)
    batches = grain.MapDataset.range(math.ceil(len(positions) / batch_size)).map(load)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    bad = 0
    for batch in batches.to_iter_dataset(options):
        for key, _, reason in batch.pop("skipped"):
            log.warning("Bad sample %s is left out of the evaluation: %s.", key, reason)
            bad += 1
        yield batch
    if bad:
        log.warning("%d of %d samples are left out of the evaluation.", bad, len(source))


@dataclasses.dataclass(frozen=True)
class _LoadImages:
    """A function of n that loads the rows of a process in the n-th batch of an evaluation."""

    source: Source
    positions: Sequence[int]
    image_transform: ImageTransform
    rows: int
    process_index: int
    process_count: int

    def __call__(self, n: int) -> dict[str, Any]:
        pixels = np.zeros((self.rows, *self.image_transform.output_shape), np.uint8)
        index_B = np.full(self.rows, -1, np.int32)
        skipped = []
        # The processes' rows of one global batch lie side by side, in the order of the process index.
        # Behind the last image the slice is short or empty; the rest of the rows stays padding.
        first = (n * self.process_count + self.process_index) * self.rows
        for row, position in enumerate(self.positions[first : first + self.rows]):
            key = f"number {position}"
            try:
                example = self.source[position]
                key = example["key"]
                pixels[row] = self.image_transform.eval(example["image"])
                index_B[row] = first + row
            except BadSampleError as reason:
                skipped.append((key, reason.kind, str(reason)))
        return {"pixel_values": pixels, "index": index_B, "skipped": tuple(skipped)}
