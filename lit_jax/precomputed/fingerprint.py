"""Fingerprints: hashes that change when the data, the parameters or the preprocessing change."""

import concurrent.futures
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lit_jax.data.example import BadSampleError, Example, Source
from lit_jax.data.files import ObjectPath, signature
from lit_jax.distributed.checksums import checksums
from lit_jax.models.dual_encoder import DualEncoderModule, Side, tower_name
from lit_jax.trees import Tree, flatten

# The number of examples that a data set's fingerprint covers.
SAMPLED = 4096
# The number where each example is read with its image. Blocks of neighbours touch few row groups of a table.
WITH_IMAGES = 256
_BLOCK = 16
# Threads that read the examples. With an object store, each thread spends its time waiting for an answer.
_THREADS = 16


def fingerprint(value: Any) -> str:
    """Return a hash, 32 hexadecimal digits, of a JSON value that may also contain NumPy arrays and bytes."""
    # Sorted keys make the hash independent of the order in which a dict was filled.
    text = json.dumps(value, sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(value: Any) -> str:
    if not isinstance(value, np.ndarray | bytes):
        raise TypeError(f"A {type(value).__name__} has no fingerprint.")
    return np.asarray(value).tobytes().hex()


def tree_checksums(tree: Tree) -> dict[str, Any]:
    """Return shape, dtype and checksum of each parameter by its path, for `fingerprint`.

    All processes must call this function, under `jax.set_mesh`: the checksums are computed on the devices.
    """
    leaves = flatten(tree)
    sums = jax.device_get(checksums(leaves))
    return {path: [f"{leaves[path].shape} {leaves[path].dtype}", sums[path]] for path in sums}


def tower_fingerprint(module: DualEncoderModule, side: Side, params: Tree) -> str:
    """Return a hash of the config and the parameters of a tower, without its projection.

    Args:
        params: the parameters on the mesh of `jax.set_mesh`, in the dtype of the computation.

    All processes must call this function.
    """
    tower = getattr(module, tower_name(side))
    first_token = module.text_first_token if side == "text" else None
    # Everything that changes the features belongs here. `remat` and the cuts of stacks do not change them.
    about = f"{tower.config} {tower.pooling} {np.dtype(tower.dtype)} {first_token}"
    return fingerprint([about, tree_checksums(params[tower_name(side)])])


def sampled_examples(source: Source) -> list[Example]:
    """Return at most `SAMPLED` examples, evenly spaced over the source; a bad example has no content."""
    count = min(len(source), SAMPLED)
    return _read(source, np.linspace(0, len(source) - 1, count))


def sampled_at_start(source: Source) -> list[Example]:
    """Return the examples to compare at each start of a run, which must not read thousands of images.

    The result has at most `WITH_IMAGES` examples if any of them contains its image (bytes or pixels).
    Otherwise it is the result of `sampled_examples`.
    """
    block = min(_BLOCK, len(source))
    starts = np.linspace(0, len(source) - block, WITH_IMAGES // _BLOCK).astype(int)
    # Blocks overlap in a short source, so positions are made unique.
    few = _read(source, np.unique(starts[:, None] + np.arange(block)))
    if any(isinstance(example["image"], bytes | np.ndarray) for example in few):
        return few
    return sampled_examples(source)


def _read(source: Source, positions: np.ndarray) -> list[Example]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        # `map` keeps the order of the positions.
        return list(pool.map(functools.partial(_sample, source), positions.astype(int).tolist()))


def _sample(source: Source, index: int) -> Example:
    try:
        return source[index]
    except BadSampleError as reason:
        # A bad example must have a fingerprint, too: the next run sees it again with the same reason.
        return Example(key=str(reason), image=None, captions=(), label=None)


def data_fingerprint(source: Source, sample: Sequence[Example], *sides: str) -> str:
    """Return a hash of the number of examples and of the sampled keys, captions and images.

    Args:
        sides: "text" includes the captions, "image" the images that are bytes or arrays. Image files are not
            read.
    """
    parts: list[Any] = [len(source)]
    for example in sample:
        # Keys stand for the examples and their order, even where contents are not read.
        parts.append(example["key"])
        image = example["image"]
        if "text" in sides:
            parts.append(example["captions"])
        if "image" in sides and isinstance(image, (bytes, np.ndarray)):
            parts.append(hashlib.sha256(np.asarray(image).tobytes()).hexdigest())
    return fingerprint(parts)


def images_fingerprint(source: Source) -> str:
    """Return a hash over all images: path, size and time of an image file, else the content."""
    return fingerprint([_image_identity(source, i) for i in range(len(source))])


def _image_identity(source: Source, index: int) -> Any:
    try:
        image = source[index]["image"]
    except BadSampleError as reason:
        return str(reason)
    if isinstance(image, np.ndarray):
        return [image.dtype.str, image.shape, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    if not isinstance(image, Path | ObjectPath):
        return image
    try:
        return [repr(image), *signature(image)]
    except (OSError, ValueError):
        # The file is missing, or its path has a null byte.
        return repr(image)
