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
_THREADS = 16  # that read them: where the data are in an object store, each waits for an answer


def sampled_examples(source: Source) -> list[Example]:
    """Return at most `SAMPLED` examples, evenly over the whole source; one that is bad is an empty one."""
    count = min(len(source), SAMPLED)
    positions = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(functools.partial(_sample, source), positions))


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
