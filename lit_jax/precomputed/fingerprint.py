"""Whether data are the same as before: their length, and a hash of examples all over them."""

import concurrent.futures
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_jax.data.example import BadSampleError, Example, Source

SAMPLED = 4096  # examples that stand for the data set in its fingerprint
# Examples that do so where each is read with its image, in blocks of neighbours: of a table few row groups.
WITH_IMAGES = 256
_BLOCK = 16
_THREADS = 16  # that read them: where the data are in an object store, each waits for an answer


def sampled_examples(source: Source) -> list[Example]:
    """Return at most `SAMPLED` examples, evenly over the whole source; one that is bad is an empty one."""
    count = min(len(source), SAMPLED)
    return _read(source, np.linspace(0, len(source) - 1, count))


def sampled_at_start(source: Source) -> list[Example]:
    """Return examples to compare at each start of a run, which must not read thousands of images.

    They are at most `WITH_IMAGES` if any has the content of its image; otherwise those of `sampled_examples`.
    """
    block = min(_BLOCK, len(source))
    starts = np.linspace(0, len(source) - block, WITH_IMAGES // _BLOCK).astype(int)
    few = _read(source, np.unique(starts[:, None] + np.arange(block)))
    if any(isinstance(example["image"], bytes | np.ndarray) for example in few):
        return few
    return sampled_examples(source)


def _read(source: Source, positions: np.ndarray) -> list[Example]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(functools.partial(_sample, source), positions.astype(int).tolist()))


def _sample(source: Source, index: int) -> Example:
    try:
        return source[index]
    except BadSampleError as reason:
        return Example(key=str(reason), image=None, captions=(), label=None)


def data_fingerprint(source: Source, sample: Sequence[Example], *sides: str) -> str:
    """Return a hash of the number of examples and, of the sampled ones, keys and what `sides` ask for.

    Args:
        sides: "text" takes the captions in, "image" the images that are no files.
    """
    parts: list[Any] = [len(source)]
    for example in sample:
        parts.append(example["key"])
        image = example["image"]
        if "text" in sides:
            parts.append(example["captions"])
        if "image" in sides and isinstance(image, (bytes, np.ndarray)):
            parts.append(hashlib.sha256(np.asarray(image).tobytes()).hexdigest())
    return fingerprint(parts)


def fingerprint(value: Any) -> str:
    """Return a hash of what JSON can say; of an array it takes the bytes."""
    text = json.dumps(value, sort_keys=True, default=lambda array: array.tobytes().hex())
    return hashlib.sha256(text.encode()).hexdigest()[:32]
