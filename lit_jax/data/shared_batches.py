"""Batches that worker processes pass to the main process in memory that both have mapped.

New memory for each batch would cost the kernel a tenth of the time that it takes to decode the images. A
worker therefore keeps what it has once mapped, a slot for each batch that is under way, and writes into a
slot again when the main process holds no array of it any more.
"""

import dataclasses
import errno
import functools
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_jax.errors import UserError

# Files there are memory. Elsewhere they are files on a disk, which the system keeps in memory for a while.
_MEMORY = Path("/dev/shm")
# The first byte of a slot tells whether the main process holds arrays of it.
_FREE, _TAKEN = 0, 1
# Arrays start at multiples of this, because JAX on a CPU takes only such arrays without a copy.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class SharedBatch:
    """The message of a worker about a batch that it has written.

    Attributes:
        file: the name of the slot.
        arrays: name -> (first byte in the slot, shape, dtype).
        others: the values of the batch that are not arrays.
    """

    file: str
    arrays: Mapping[str, tuple[int, tuple[int, ...], np.dtype]]
    others: Mapping[str, Any]


class SlotWriter:
    """The slots of a worker, which one thread writes.

    Args:
        folder: the folder of the main process's `SlotReader`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._slots: dict[str, mmap.mmap] = {}

    def write(self, batch: Mapping[str, Any]) -> SharedBatch:
        """Write a batch. Raise UserError if there is no memory for one more slot."""
        arrays, size = {}, _ALIGNMENT
        for name, value in batch.items():
            # Objects are addresses, which mean nothing to another process. A subclass of an array has more
            # than values.
            if type(value) is np.ndarray and not value.dtype.hasobject:
                arrays[name] = size, value.shape, value.dtype
                size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        file, memory = self._take(size)
        for name, (start, shape, dtype) in arrays.items():
            np.ndarray(shape, dtype, memory, start)[...] = batch[name]
        others = {name: value for name, value in batch.items() if name not in arrays}
        return SharedBatch(file, arrays, others)

    def _take(self, size: int) -> tuple[str, mmap.mmap]:
        """Return the name and the memory of a slot of at least `size` bytes, which is taken from now on."""
        free = [
            file
            for file, memory in self._slots.items()
            if memory[0] == _FREE and len(memory) >= size
        ]
        # The process id keeps the files of workers apart, which share the folder.
        file = free[0] if free else f"{os.getpid()}-{len(self._slots)}"
        if not free:
            self._slots[file] = _new_memory(self._folder / file, size)
        memory = self._slots[file]
        memory[0] = _TAKEN
        return file, memory


@functools.cache
def _slot_writer(folder: Path) -> SlotWriter:
    return SlotWriter(folder)


def write_batch(folder: Path, batch: Mapping[str, Any]) -> SharedBatch:
    """Write a batch into a slot of this process, whose slots in `folder` last as long as the process."""
    return _slot_writer(folder).write(batch)


def _new_memory(path: Path, size: int) -> mmap.mmap:
    """Map `size` bytes of a new file. Raise UserError if there is no space for them."""
    try:
        with path.open("x+b") as opened:
            # Memory that is mapped before it is there would end the process where there is none left.
            opened.write(bytes(size))
            opened.flush()
            return mmap.mmap(opened.fileno(), size)
    except OSError as error:
        path.unlink(missing_ok=True)
        remedy = "run the same command again, or set config.data.workers=0"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            disk = path.parent.parent
            larger = f"enlarge {disk}"
            larger += " (docker run --shm-size=8g)" if disk == _MEMORY else ", or set TMPDIR"
            remedy = f"{larger}, or lower config.data.workers"
        raise UserError(
            f"A batch of {size:,} bytes from a worker cannot be passed through {path.parent} "
            f"({error.strerror}); {remedy}."
        ) from error


class SlotReader:
    """The slots of all workers in the main process.

    Attributes:
        folder: the folder in which a slot has a name until it is first read.
    """

    def __init__(self):
        memory = _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="lit_jax-", dir=memory)
        self.folder = Path(self._folder.name)
        self._slots: dict[str, mmap.mmap] = {}

    def read(self, shared: SharedBatch) -> dict[str, Any]:
        """Return a batch. Its slot is free when the last of its arrays is gone."""
        if shared.file not in self._slots:
            path = self.folder / shared.file
            with path.open("r+b") as opened:
                self._slots[shared.file] = mmap.mmap(opened.fileno(), 0)
            # Without a name, the memory is freed with the last process that has it, however that one ends.
            path.unlink()
        memory = self._slots[shared.file]
        whole = np.frombuffer(memory, np.uint8)
        # Views of `whole` hold `whole`, and so do arrays of JAX that have not copied.
        weakref.finalize(whole, memory.__setitem__, 0, _FREE).atexit = False
        arrays = {
            name: np.ndarray(shape, dtype, whole, start)
            for name, (start, shape, dtype) in shared.arrays.items()
        }
        return {**arrays, **shared.others}

    def close(self) -> None:
        """Remove the folder, with the slots that were never read. The arrays that were read stay valid."""
        self._folder.cleanup()
        # An array holds the memory of its own slot.
        self._slots.clear()
