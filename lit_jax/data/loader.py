"""Batches for training: each example is preprocessed for the two towers, and rows are collated.

The order of the training data is a function of seed and step alone: the same with any number of threads,
workers and processes. So the position in the data is one number, and a run can go on with other hardware.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from transformers import PreTrainedTokenizerBase

from lit_jax.config import TEACHER, DataConfig, Side
from lit_jax.data.example import (
    BAD_KINDS,
    BadKind,
    BadSampleError,
    Example,
    Source,
    sample_caption,
    usable_captions,
)
from lit_jax.data.image import ImageTransform
from lit_jax.data.mixture import part_of, training_order
from lit_jax.data.text import tokenize
from lit_jax.data.workers import start_worker, worker_errors
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
# (key, kind, reason) of each bad sample.
Skipped = tuple[tuple[str, BadKind, str], ...]

# For one element of a batch: so many bad samples in a row are no accident.
MAX_TRIES = 100
# Samples read, before a fraction of bad ones means anything.
JUDGE_AFTER = 1000


@runtime_checkable
class Preprocessor(Protocol):
    """A maker of the inputs of one tower or both. Plain values: it is sent to worker processes."""

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> Any:
        """Return the element of a training batch, from the example at `index` of the source.

        One of several captions or views is sampled. Raises BadSampleError.
        """
        ...

    def collate(self, elements: Sequence[Any]) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """The images of a batch: 'pixel_values' uint8 (rows, height, width, 3).

    With `views` an image is not augmented anew each time: one of so many fixed views is sampled. They depend
    on its position in the source alone, so that runs of all seeds share them.
    """

    transform: ImageTransform
    views: int | None = None

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        if self.views is None:
            return self.transform.train(example["image"], rng)
        return self._view(index, example, int(rng.integers(self.views)))

    def variants(self, index: int, example: Example) -> list[np.ndarray]:
        """Return each view once."""
        return [self._view(index, example, view) for view in range(self.views or 1)]

    def collate(self, elements: Sequence[np.ndarray]) -> Batch:
        return {"pixel_values": np.stack(elements)}

    def _view(self, index: int, example: Example, view: int) -> np.ndarray:
        return self.transform.train(example["image"], np.random.default_rng((index, view)))


@dataclasses.dataclass(frozen=True)
class TextPreprocessor:
    """The texts of a batch: int32 (rows, the tokenizer's model_max_length) 'input_ids'.

    With them come 'attention_mask' and 'token_type_ids', as far as the tokenizer makes them.
    """

    tokenizer: PreTrainedTokenizerBase

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> str:
        return sample_caption(example, rng)

    def variants(self, index: int, example: Example) -> list[str]:
        """Return each caption once."""
        return usable_captions(example)

    def collate(self, elements: Sequence[str]) -> Batch:
        return tokenize(self.tokenizer, elements, length=self.tokenizer.model_max_length)


@dataclasses.dataclass(frozen=True)
class PairPreprocessor:
    """The inputs of an image tower and those of a text tower."""

    images: Preprocessor
    texts: Preprocessor

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> tuple[Any, Any]:
        # The order is part of what a seed means.
        text = self.texts.sample(index, example, rng)
        return self.images.sample(index, example, rng), text

    def collate(self, elements: Sequence[tuple[Any, Any]]) -> Batch:
        images, texts = zip(*elements, strict=True)
        return {**self.images.collate(images), **self.texts.collate(texts)}


@dataclasses.dataclass(frozen=True)
class TeacherPreprocessor:
    """The inputs of a text tower, and those of its teacher, 'teacher_input_ids' and so on.

    The teacher gets the caption in its own language or, where there is none, the same caption.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> tuple[str, str]:
        caption = sample_caption(example, rng)
        return caption, example.get("teacher_caption") or caption

    def collate(self, elements: Sequence[tuple[str, str]]) -> Batch:
        captions, teacher_captions = zip(*elements, strict=True)
        taught = TextPreprocessor(self.teacher_tokenizer).collate(teacher_captions)
        return {
            **TextPreprocessor(self.tokenizer).collate(captions),
            **{f"{TEACHER}_{name}": array for name, array in taught.items()},
        }


@dataclasses.dataclass(frozen=True)
class Processors:
    """The image transform and the tokenizer of a model, and the tokenizer of its teacher if it has one."""

    image_transform: ImageTransform
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def of_tower(self, side: Side, views: int | None) -> ImagePreprocessor | TextPreprocessor:
        """Return the preprocessor of one tower; an image has so many fixed views, None: any number."""
        if side == "image":
            return ImagePreprocessor(self.image_transform, views)
        return TextPreprocessor(self.tokenizer)


def make_preprocessor(
    processors: Processors,
    views: int | None,
    precomputed: Mapping[Side, Preprocessor] = MappingProxyType({}),
) -> Preprocessor:
    """Return the preprocessor of training; `precomputed` takes the place of a tower's own."""
    if processors.teacher_tokenizer is not None:
        return TeacherPreprocessor(processors.tokenizer, processors.teacher_tokenizer)
    image, text = (
        precomputed.get(side) or processors.of_tower(side, views) for side in ("image", "text")
    )
    return PairPreprocessor(image, text)


class TrainStream:
    """The endless batches of this process, each source shuffled anew in every epoch of its own.

    A bad sample is replaced by another one of its source, drawn at random.

    Attributes:
        bad_samples: how many of each kind this process has met since the start of the run.

    Raises:
        UserError: the batch cannot be split evenly, or (from `next`) too many samples are bad.
    """

    def __init__(
        self,
        source: Source,
        preprocessor: Preprocessor,
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
            .random_map(_Read(source, preprocessor))
            .slice(slice(process_index, None, process_count))
            # Endless, so there is no remainder; but if kept, Grain overflows for batches of one row.
            .batch(rows, drop_remainder=True, batch_fn=_Collate(preprocessor))
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
            # mp_prefetch reads absl flags also where no absl.app runs.
            flags.FLAGS.mark_as_parsed()
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
    """The way from a position in the source to an element of a batch, and the bad samples it replaces."""

    source: Source
    preprocessor: Preprocessor

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Any, Skipped]:
        skipped = []
        while len(skipped) < MAX_TRIES:
            # The key, until the example tells its own.
            key = f"number {index}"
            try:
                example = self.source[index]
                key = example["key"]
                return self.preprocessor.sample(index, example, rng), tuple(skipped)
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
    preprocessor: Preprocessor

    def __call__(self, rows: Sequence[tuple[Any, Skipped]]) -> dict[str, Any]:
        elements, skipped = zip(*rows, strict=True)
        return {**self.preprocessor.collate(elements), "skipped": sum(skipped, ())}
