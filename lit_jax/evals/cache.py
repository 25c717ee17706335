"""Embeddings that were computed before: in memory for one model's evaluations, on disk for later ones."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.files import ObjectPath, signature
from lit_jax.distributed.checksums import checksums
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import write_whole
from lit_jax.trees import flatten

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, ...]


class EmbeddingCache:
    """What one model makes of images and texts; take a new one when its parameters have changed.

    With a `folder` that outlives the command: a file is named after all that decides its content, so that
    what is no longer asked for is never wrong, only useless.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._memory: dict[Hashable, Arrays] = {}
        if folder is not None and is_primary():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"The cache {folder} cannot be written ({error.strerror}); give another folder."
                ) from None

    def once(
        self,
        key: Hashable,
        fingerprint: Callable[[], str],
        compute: Callable[[], Arrays],
        complete: Callable[[Arrays], Arrays],
    ) -> Arrays:
        """What `compute` returns, computed only if it is not there.

        Args:
            key: names it in memory.
            fingerprint: names it on disk; called only if there is a folder.
            complete: tries again what the arrays from disk lack; gives them back as they are if in vain.
        """
        if key not in self._memory:
            self._memory[key] = (
                self._on_disk(fingerprint(), compute, complete) if self._folder else compute()
            )
        return self._memory[key]

    def _on_disk(
        self, name: str, compute: Callable[[], Arrays], complete: Callable[[Arrays], Arrays]
    ) -> Arrays:
        assert self._folder is not None
        file = self._folder / f"{name}.npz"
        arrays = self._read(file) if is_primary() else None
        # The primary process decides and sends: the others may not see its disk, and must do the same.
        shapes = [(list(x.shape), x.dtype.str) for x in arrays or ()]
        shapes = json.loads(_broadcast(np.frombuffer(json.dumps(shapes).encode(), np.uint8)))
        if shapes:
            if arrays is None:
                arrays = tuple(np.zeros(shape, dtype) for shape, dtype in shapes)
            found = tuple(map(np.asarray, multihost_utils.broadcast_one_to_all(arrays)))
            arrays = complete(found)
            if arrays is found:
                return found
        else:
            arrays = compute()
        if is_primary():
            content = io.BytesIO()
            np.savez(content, *arrays)
            try:
                write_whole(file, content.getvalue())
            except OSError as error:
                log.warning("The cache %s cannot be written (%s).", file, error.strerror)
        return arrays

    def _read(self, file: Path) -> Arrays | None:
        try:
            with np.load(file) as content:
                return tuple(content[name] for name in content.files)
        except FileNotFoundError:
            return None
        except Exception as error:  # of a damaged file NumPy lets through whatever it raises
            log.warning("%s is damaged (%s); it is made anew.", file, error)
            return None


def _broadcast(text_B: np.ndarray) -> bytes:
    """The bytes that the primary process has, up to 1 KiB of them."""
    padded = np.zeros(1024, np.uint8)
    padded[: len(text_B)] = text_B
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")


def of_parts(*parts: Any) -> str:
    """A name for what these values decide together: texts, numbers, arrays in tuples, lists and dicts."""
    digest = hashlib.blake2b(digest_size=16)
    leaves = jax.tree.flatten_with_path(parts, is_leaf=lambda leaf: leaf is None)[0]
    for path, leaf in leaves:
        array = isinstance(leaf, np.ndarray)
        text = repr((jax.tree_util.keystr(path), (leaf.dtype.str, leaf.shape) if array else leaf))
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(leaf.tobytes() if array else b"\0")
    return digest.hexdigest()


def side_params(params: Mapping[str, Any], tower: str) -> Mapping[str, Any]:
    """Return the parameters without those of the other tower."""
    others = {"vision_model", "text_model"} - {tower}
    return {name: tree for name, tree in params.items() if name not in others}


def of_side(params: Mapping[str, Any], tower: str) -> str:
    """Return a name that tells the parameters of a tower and its projection apart by each bit.

    To call under `jax.set_mesh`.
    """
    sums = jax.device_get(checksums(flatten(side_params(params, tower))))
    return of_parts(sums)


def of_images(source: Source) -> str:
    """Tells image sets apart: by path, size and time of the files, or by what is in them."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(source)):
        try:
            image = source[i]["image"]
        except BadSampleError as reason:
            image = str(reason)
        digest.update(of_parts(_of_image(image)).encode())
    return digest.hexdigest()


def _of_image(image: Any) -> Any:
    if not isinstance(image, Path | ObjectPath):
        return image
    try:
        return repr(image), *signature(image)
    except (OSError, ValueError):  # missing; a null byte in the path
        return repr(image)
