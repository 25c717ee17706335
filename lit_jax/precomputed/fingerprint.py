"""Fingerprints: hashes that tell data, parameters and inputs apart from others."""

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

# The examples that stand for a data set in its fingerprint.
SAMPLED = 4096
# Their number where each is read with its image, in blocks of neighbours: few row groups of a table.
WITH_IMAGES = 256
_BLOCK = 16
# Threads that read them: each waits for an answer where the data are in an object store.
_THREADS = 16


def fingerprint(value: Any) -> str:
    """Return a hash of what JSON can say, in hexadecimal; of arrays and bytes it takes the content."""
    text = json.dumps(value, sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(value: Any) -> str:
    if not isinstance(value, np.ndarray | bytes):
        raise TypeError(f"A {type(value).__name__} has no fingerprint.")
    return np.asarray(value).tobytes().hex()


def tree_checksums(tree: Tree) -> dict[str, Any]:
    """Return shape, dtype and checksum of each parameter by its path, for `fingerprint`.

    All processes must call it, under `jax.set_mesh`: the checksums are computed on the devices.
    """
    leaves = flatten(tree)
    sums = jax.device_get(checksums(leaves))
    return {path: [f"{leaves[path].shape} {leaves[path].dtype}", sums[path]] for path in sums}


def tower_fingerprint(module: DualEncoderModule, side: Side, params: Tree) -> str:
    """Return a hash of the config and the parameters of a tower, without its projection.

    Args:
        params: on the mesh of `jax.set_mesh`, in the dtype of the computation.

    All processes must call it.
    """
    tower = getattr(module, tower_name(side))
    first_token = module.text_first_token if side == "text" else None
    about = f"{tower.config} {tower.pooling} {np.dtype(tower.dtype)} {first_token}"
    return fingerprint([about, tree_checksums(params[tower_name(side)])])


def sampled_examples(source: Source) -> list[Example]:
    """Return at most `SAMPLED` examples, evenly over the whole source; a bad one is an empty one."""
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
        sides: "text" includes the captions, "image" the images that are not files.
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


def images_fingerprint(source: Source) -> str:
    """Return a hash of all images: of path, size and time of files, or of their content."""
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
