"""A cache of embeddings: in memory for the evaluations of one model, in a folder for later commands."""

import io
import json
import logging
from collections.abc import Callable, Hashable

import numpy as np
from jax.experimental import multihost_utils

from lit_jax.buckets import AnyPath
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import atomic_write

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, ...]


class EmbeddingCache:
    """The embeddings of one set of parameters; new parameters need a new cache.

    With a `folder`, embeddings outlive the command. A file's name is a fingerprint of everything that
    determines its content, so an old file is never wrong, only unused.
    """

    def __init__(self, folder: AnyPath | None = None):
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
        """Return the cached arrays, or the result of `compute`. All processes must make the same calls.

        Args:
            key: the key in memory.
            fingerprint: returns the file's name; called only if the cache has a folder.
            complete: retries the parts that the arrays from a file lack; returns the same object if it cannot
                add any.
        """
        if key not in self._memory:
            self._memory[key] = (
                self._in_folder(fingerprint(), compute, complete) if self._folder else compute()
            )
        return self._memory[key]

    def _in_folder(
        self, name: str, compute: Callable[[], Arrays], complete: Callable[[Arrays], Arrays]
    ) -> Arrays:
        assert self._folder is not None
        file = self._folder / f"{name}.npz"
        arrays = self._read(file) if is_primary() else None
        # The primary process decides and broadcasts: the others may not see its disk, and a process that took
        # another branch would leave the rest waiting in a collective.
        shapes = [(list(x.shape), x.dtype.str) for x in arrays or ()]
        shapes = json.loads(_broadcast(np.frombuffer(json.dumps(shapes).encode(), np.uint8)))
        if shapes:
            # `broadcast_one_to_all` needs arrays of the same shape on every process.
            if arrays is None:
                arrays = tuple(np.zeros(shape, dtype) for shape, dtype in shapes)
            found = tuple(map(np.asarray, multihost_utils.broadcast_one_to_all(arrays)))
            arrays = complete(found)
            # Nothing was added, so the file stays.
            if arrays is found:
                return found
        else:
            arrays = compute()
        if is_primary():
            content = io.BytesIO()
            np.savez(content, *arrays)
            try:
                atomic_write(file, content.getvalue())
            # The evaluation has succeeded; a full disk must not lose its result.
            except OSError as error:
                log.warning("The cache %s cannot be written (%s).", file, error.strerror)
        return arrays

    def _read(self, file: AnyPath) -> Arrays | None:
        try:
            with np.load(io.BytesIO(file.read_bytes())) as content:
                return tuple(content[name] for name in content.files)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s); it is computed again.", file, error)
            return None
        except Exception as error:
            # NumPy raises exceptions of many types for a damaged file.
            log.warning("%s is damaged (%s); it is computed again.", file, error)
            return None


def _broadcast(text_B: np.ndarray) -> bytes:
    """Return the bytes of the primary process, at most 1 KiB, without trailing zeros."""
    # A fixed size, since the other processes do not know the length.
    padded = np.zeros(1024, np.uint8)
    padded[: len(text_B)] = text_B
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")
