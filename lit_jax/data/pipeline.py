"""Batches for training and for evaluation.

The order of the training data is a function of seed and step alone: the same with any number of threads,
workers and processes. So the position in the data is one number, and a run can go on with other hardware.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from lit_jax.config import DataConfig
from lit_jax.data.example import BAD_KINDS, BadKind, BadSampleError, Source
from lit_jax.data.image import ImageTransform
from lit_jax.data.mixture import part_of, training_order
from lit_jax.data.readers import Batch, Reader
from lit_jax.data.workers import start_worker, worker_errors
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

Skipped = tuple[tuple[str, BadKind, str], ...]  # (key, kind, reason) of each bad sample

MAX_TRIES = 100  # for one element of a batch; so many bad samples in a row are no accident
JUDGE_AFTER = 1000  # samples read, before a fraction of bad ones means anything


class TrainStream:
    """Endless batches of this process, each source shuffled anew in every epoch of its own.

    `reader` says what is in a batch. A bad sample is replaced by another one of its source, drawn at random.

    Attributes:
        bad_samples: how many of each kind this process has met since the start of the run.

    Raises:
        UserError: the batch cannot be split evenly, or (from `next`) too many samples are bad.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        *,
        config: DataConfig,
        seed: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        rows = local_rows(batch_size, process_count)
        self.bad_samples: dict[str, int] = dict.fromkeys(BAD_KINDS, 0)
        self._config = config
        self._judge_after = min(JUDGE_AFTER, len(source))
        self._samples_read = 0
        self._reasons: dict[str, str] = {}
        # random_map seeds its generator by the element's position here, before the slice: augmentations
        # depend on neither the number of processes nor that of workers.
        self._batches = (
            training_order(source, seed)
            .random_map(_Read(source, reader))
            .slice(slice(process_index, None, process_count))
            # Endless, so there is no remainder; but if kept, Grain overflows for batches of one row.
            .batch(rows, drop_remainder=True, batch_fn=_Collate(reader))
        )
        self._rows = rows
        self._open(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with worker_errors():
            batch = next(self._iterator)
        self._next_batch += 1
        self._account(batch.pop("skipped"))
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position, counted from the start of the run.

        It is the number of the next batch, and how many samples, good and bad, this process has met before
        it, the bad ones by kind.
        """
        return {
            "next_batch": self._next_batch,
            "samples_read": self._samples_read,
            "bad_samples": dict(self.bad_samples),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `get_state` gave, with these or other workers and processes.

        A run saves that of its first process: all go on from what that one has counted.
        """
        self.close()
        self._open(state["next_batch"])
        self._samples_read, self.bad_samples = state["samples_read"], dict(state["bad_samples"])

    def close(self) -> None:
        """Stop threads and worker processes."""
        self._iterator.close()

    def _open(self, start: int) -> None:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # mp_prefetch reads absl flags also where no absl.app runs
        # Each thread prepares a batch of its own; a longer queue would only cost memory.
        threads = grain.ReadOptions(
            num_threads=self._config.threads, prefetch_buffer_size=self._config.threads
        )
        batches = self._batches.slice(slice(start, None)).to_iter_dataset(threads)
        workers = grain.multiprocessing.MultiprocessingOptions(num_workers=self._config.workers)
        self._iterator = iter(batches.mp_prefetch(workers, _start_worker))
        self._next_batch = start

    def _account(self, skipped: Skipped) -> None:
        self._samples_read += self._rows + len(skipped)
        for key, kind, reason in skipped:
            self.bad_samples[kind] += 1
            if key not in self._reasons:
                self._reasons[key] = reason
                log.warning("Bad sample %s is replaced by another: %s.", key, reason)
        bad = sum(self.bad_samples.values())
        fraction = bad / self._samples_read
        if self._samples_read >= self._judge_after and fraction > self._config.max_bad_fraction:
            # None is known here if all of them came before the run was resumed.
            examples = [f", for example {key}: {why}" for key, why in self._reasons.items()]
            raise UserError(
                f"{bad} of {self._samples_read} samples are bad ({fraction:.1%}: "
                f"{_by_kind(self.bad_samples)}){''.join(examples[-1:])}; fix the data, or raise "
                "config.data.max_bad_fraction."
            )


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _start_worker(_index: int, _count: int) -> None:
    start_worker()


def local_rows(batch_size: int, process_count: int) -> int:
    """Return how many rows of a batch each process reads. Raise UserError if they do not divide evenly."""
    if batch_size % process_count:
        raise UserError(
            f"A batch size of {batch_size} does not divide by {process_count} processes; "
            "make it a multiple of the number of processes."
        )
    return batch_size // process_count


@dataclasses.dataclass(frozen=True)
class _Read:
    """From a position in the source to one element of a batch."""

    source: Source
    reader: Reader

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        skipped = []
        while len(skipped) < MAX_TRIES:
            key = f"number {index}"  # until it is known
            try:
                example = self.source[index]
                key = example["key"]
                return {**self.reader.read(index, example, rng), "skipped": skipped}
            except BadSampleError as reason:
                skipped.append((key, reason.kind, str(reason)))
                part = part_of(self.source, index)
                index = int(rng.integers(part.start, part.stop))
        key, _, reason = skipped[0]
        raise UserError(
            f"{MAX_TRIES} samples in a row are bad, the first is {key}: {reason}; fix the data set."
        )


@dataclasses.dataclass(frozen=True)
class _Collate:
    reader: Reader

    def __call__(self, elements: Sequence[dict[str, Any]]) -> dict[str, Any]:
        skipped = tuple(item for element in elements for item in element["skipped"])
        return {**self.reader.collate(elements), "skipped": skipped}


def eval_batches(
    source: Source,
    image_transform: ImageTransform,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    positions: Sequence[int] | None = None,
    threads: int = 8,
) -> Iterator[Batch]:
    """Yield the images at `positions` of the source, or all, once, in order, this process's share of them.

    Every process gets the same number of equally large batches.

    Args:
        batch_size: over all processes.

    Yields:
        'pixel_values' uint8 (rows, height, width, 3); 'index' int32 (rows): its place among `positions`,
        or -1 for padding and for an image that cannot be decoded (its key is logged).
    """
    rows = local_rows(batch_size, process_count)
    positions = range(len(source)) if positions is None else positions
    load = _LoadImages(source, positions, image_transform, rows, process_index, process_count)
    batches = grain.MapDataset.range(math.ceil(len(positions) / batch_size)).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
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
    """One process's rows of the n-th batch of an evaluation."""

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
