"""Batches for training: each example is preprocessed for the two towers, and the rows are collated.

The order of the training data depends on seed and step alone, not on the number of threads, workers or
processes. The position in the data is therefore one number, and a run can resume on other hardware.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
from lit_jax.data.shared_batches import SlotReader, write_batch
from lit_jax.data.text import tokenize
from lit_jax.data.workers import start_worker, worker_errors
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
# (key, kind, reason) of each bad sample.
Skipped = tuple[tuple[str, BadKind, str], ...]

# The most bad samples in a row for one element of a batch: more are not chance but a broken data set.
MAX_TRIES = 100
# The number of samples after which the fraction of bad samples is judged; earlier it is mostly noise.
JUDGE_AFTER = 1000


@runtime_checkable
class Preprocessor(Protocol):
    """The preprocessing for one tower or both. Implementations hold plain values and can be pickled."""

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> Any:
        """Return one element of a training batch, made from the example at `index` of the source.

        One of several captions or views is sampled. Raises BadSampleError if the example cannot be used.
        """
        ...

    def collate(self, elements: Sequence[Any]) -> Batch:
        """Return the arrays of a batch, with one row for each element."""
        ...


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """The images of a batch: 'pixel_values' uint8 (rows, height, width, 3).

    With `views` an image is not augmented anew each time: one of `views` fixed augmentations is sampled. The
    views depend on the image's position in the source alone, so that runs with different seeds can share
    features computed in advance.
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
        # A generator of its own: the views in the features' files must come out the same in every run.
        return self.transform.train(example["image"], np.random.default_rng((index, view)))


@dataclasses.dataclass(frozen=True)
class TextPreprocessor:
    """The texts of a batch: 'input_ids' int32 (rows, the tokenizer's model_max_length).

    'attention_mask' and 'token_type_ids' of the same shape are added if the tokenizer makes them.
    """

    tokenizer: PreTrainedTokenizerBase

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> str:
        return sample_caption(example, rng)

    def variants(self, index: int, example: Example) -> list[str]:
        """Return each caption once."""
        return usable_captions(example)

    def collate(self, elements: Sequence[str]) -> Batch:
        # Padded to a fixed length: with another shape the train step would be compiled anew.
        return tokenize(self.tokenizer, elements, length=self.tokenizer.model_max_length)


@dataclasses.dataclass(frozen=True)
class PairPreprocessor:
    """The inputs of an image tower and those of a text tower."""

    images: Preprocessor
    texts: Preprocessor

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> tuple[Any, Any]:
        # Both draw from the same generator, so another order would change the data of every seed.
        text = self.texts.sample(index, example, rng)
        return self.images.sample(index, example, rng), text

    def collate(self, elements: Sequence[tuple[Any, Any]]) -> Batch:
        images, texts = zip(*elements, strict=True)
        return {**self.images.collate(images), **self.texts.collate(texts)}


@dataclasses.dataclass(frozen=True)
class TeacherPreprocessor:
    """The inputs of a text tower and of its teacher: 'input_ids', 'teacher_input_ids' and so on.

    The teacher gets the translation in its own language or, without a translation, the same caption.
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
        """Return the preprocessor of one tower; `views` is the number of fixed views of an image, if any."""
        if side == "image":
            return ImagePreprocessor(self.image_transform, views)
        return TextPreprocessor(self.tokenizer)


def make_preprocessor(
    processors: Processors,
    views: int | None,
    precomputed: Mapping[Side, Preprocessor] = MappingProxyType({}),
) -> Preprocessor:
    """Return the preprocessor for training; a preprocessor in `precomputed` replaces that of its tower."""
    if processors.teacher_tokenizer is not None:
        return TeacherPreprocessor(processors.tokenizer, processors.teacher_tokenizer)
    image, text = (
        precomputed.get(side) or processors.of_tower(side, views) for side in ("image", "text")
    )
    return PairPreprocessor(image, text)


class TrainStream:
    """The endless batches of this process. Each source is shuffled anew in each of its epochs.

    A bad sample is replaced by a random sample of the same source.

    Attributes:
        bad_samples: the number of bad samples of each kind that this process has read since the start of the
            run.

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
        # A small source is judged after one epoch.
        self._judge_after = min(JUDGE_AFTER, len(source))
        self._samples_read = 0
        self._reasons: dict[str, str] = {}
        # `random_map` seeds its generator by the element's position. It comes before the slice, so that the
        # augmentations depend neither on the number of processes nor on the number of workers.
        self._rows = (
            training_order(source, seed)
            .random_map(_Read(source, preprocessor))
            .slice(slice(process_index, None, process_count))
        )
        self._preprocessor = preprocessor
        self._batch_rows = rows
        self._open(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with worker_errors():
            batch = next(self._iterator)
        if self._slots is not None:
            batch = self._slots.read(batch)
        self._next_batch += 1
        self._account(batch.pop("skipped"))
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position, counted from the start of the run.

        The position is the number of the next batch, the number of samples that this process has read
        before, and the number of bad samples among them by kind.
        """
        return {
            "next_batch": self._next_batch,
            "samples_read": self._samples_read,
            "bad_samples": dict(self.bad_samples),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at a position from `get_state`, with any number of workers and processes.

        A checkpoint holds the position of the first process, whose counts all processes continue.
        """
        # Threads and workers have prefetched batches of the old position.
        self.close()
        self._open(state["next_batch"])
        self._samples_read, self.bad_samples = state["samples_read"], dict(state["bad_samples"])

    def close(self) -> None:
        """Stop threads and worker processes. The batches that were returned stay valid."""
        self._running.close()
        # A closed iterator still holds batches that it had read ahead.
        self._iterator = None

    def _open(self, start: int) -> None:
        if not flags.FLAGS.is_parsed():
            # `mp_prefetch` reads absl flags, which raise an error until they are parsed by `absl.app`.
            flags.FLAGS.mark_as_parsed()
        # Each thread prepares one batch at a time; a longer queue would only cost memory.
        threads = grain.ReadOptions(
            num_threads=self._config.threads, prefetch_buffer_size=self._config.threads
        )
        self._running = contextlib.ExitStack()
        batches = (
            # The data are endless and leave no remainder; but without this Grain overflows at batch size 1.
            self._rows.batch(
                self._batch_rows,
                drop_remainder=True,
                batch_fn=_Collate(self._preprocessor),
            )
            # To resume is to slice, because the order depends on the position alone.
            .slice(slice(start, None))
            .to_iter_dataset(threads)
        )
        self._slots = None
        if self._config.workers:
            self._slots = self._running.enter_context(contextlib.closing(SlotReader()))
            # After the threads, because only the few batches on their way to the main process need slots.
            batches = batches.map(functools.partial(write_batch, self._slots.folder)).mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(num_workers=self._config.workers),
                functools.partial(_start_worker, self._slots.folder),
            )
        with worker_errors():
            self._iterator: Any = iter(batches)
        self._running.callback(self._iterator.close)
        self._next_batch = start

    def _account(self, skipped: Skipped) -> None:
        """Count and log bad samples. Raise UserError if their fraction is above the limit."""
        self._samples_read += self._batch_rows + len(skipped)
        for key, kind, reason in skipped:
            self.bad_samples[kind] += 1
            # A bad sample comes back in every epoch, and is logged only once.
            if key not in self._reasons:
                self._reasons[key] = reason
                log.warning("Bad sample %s is replaced by another: %s.", key, reason)
        bad = sum(self.bad_samples.values())
        fraction = bad / self._samples_read
        if self._samples_read >= self._judge_after and fraction > self._config.max_bad_fraction:
            # A checkpoint does not hold the reasons, so a resumed run may have none to show.
            examples = [f", for example {key}: {why}" for key, why in self._reasons.items()]
            kinds = ", ".join(
                f"{count} {kind}" for kind, count in self.bad_samples.items() if count
            )
            raise UserError(
                f"{bad} of {self._samples_read} samples are bad ({fraction:.1%}: "
                f"{kinds}){''.join(examples[-1:])}; fix the data, or raise "
                "config.data.max_bad_fraction."
            )


def _start_worker(slots: Path, _index: int, _count: int) -> None:
    start_worker(slots)


def local_rows(batch_size: int, process_count: int) -> int:
    """Return the number of rows that each process reads. Raise UserError if they do not divide evenly."""
    if batch_size % process_count:
        raise UserError(
            f"A batch size of {batch_size} cannot be divided evenly among {process_count} processes; set "
            f"config.batch_size (or batch_size of the evaluation) to a multiple of {process_count}."
        )
    return batch_size // process_count


@dataclasses.dataclass(frozen=True)
class _Read:
    """The map from a position in the source to (element of a batch, bad samples that it replaces)."""

    source: Source
    preprocessor: Preprocessor

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Any, Skipped]:
        skipped = []
        while len(skipped) < MAX_TRIES:
            # A name for messages until the example's own key is read.
            key = f"number {index}"
            try:
                example = self.source[index]
                key = example["key"]
                return self.preprocessor.sample(index, example, rng), tuple(skipped)
            except BadSampleError as reason:
                skipped.append((key, reason.kind, str(reason)))
                # From the same source, so that bad samples do not change the shares of a mixture.
                part = part_of(self.source, index)
                index = int(rng.integers(part.start, part.stop))
        # The first sample is named, because the others were drawn at random in its place.
        key, _, reason = skipped[0]
        raise UserError(
            f"{MAX_TRIES} samples in a row are bad, the first of them is {key} ({reason}); fix the data, or "
            "set the path of this source (config.data.train.path) to other data."
        )


@dataclasses.dataclass(frozen=True)
class _Collate:
    """The batch function of Grain, which passes the bad samples on to the main process."""

    preprocessor: Preprocessor

    def __call__(self, rows: Sequence[tuple[Any, Skipped]]) -> dict[str, Any]:
        elements, skipped = zip(*rows, strict=True)
        return {**self.preprocessor.collate(elements), "skipped": sum(skipped, ())}
