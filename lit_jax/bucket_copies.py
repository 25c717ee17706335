"""Copies between a bucket and this machine, for readers and writers that know only local files."""

import atexit
import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from lit_jax.buckets import AnyPath, BucketPath, client, os_errors

log = logging.getLogger(__name__)

# The time between two copies of files that grow.
_COPY_SECONDS = 60.0


def temporary_copy(folder: AnyPath) -> Path:
    """Return a folder on this machine with the files of `folder`: the folder itself, or a copy of a bucket's.

    A copy is removed when this process ends.
    """
    if isinstance(folder, Path):
        return folder
    temporary = tempfile.TemporaryDirectory(prefix="lit_jax-")
    atexit.register(temporary.cleanup)
    copy, start = Path(temporary.name), str(folder).partition("://")[2]
    with os_errors(folder):
        names = [name.removeprefix(f"{start}/") for name in client(folder).find(str(folder))]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            sources = [f"{folder}/{name}" for name in names]
            client(folder).get(sources, [str(copy / name) for name in names])
    return copy


@contextlib.contextmanager
def written_locally(folder: AnyPath) -> Iterator[Path]:
    """Yield a folder on this machine, for writers that cannot write to a bucket.

    The folder is `folder` itself, or an empty one whose files are uploaded when the block ends without an
    error.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lit_jax-") as temporary:
        local = Path(temporary)
        yield local
        files = [file for file in local.rglob("*") if file.is_file()]
        # A reader takes a folder for a model as soon as its config is there.
        files.sort(key=lambda file: file == local / "config.json")
        _upload(local, folder, {file: file.stat().st_size for file in files})


@contextlib.contextmanager
def uploaded(path: BucketPath) -> Iterator[Path]:
    """Yield a path on this machine, whose file is uploaded to `path` when the block ends without an error.

    A killed process leaves a folder lit_jax-* among the temporary files, and nothing in the bucket.
    """
    with tempfile.TemporaryDirectory(prefix="lit_jax-") as temporary:
        new = Path(temporary) / "new"
        yield new
        path.upload(new)


def _upload(source: Path, folder: BucketPath, sizes: dict[Path, int]) -> None:
    """Write the first bytes of files below `source` to a bucket, as many as `sizes` says, in this order."""
    for file, size in sizes.items():
        # The file may grow meanwhile, and a client that is told one size must not find another.
        with file.open("rb") as opened:
            content = opened.read(size)
        (folder / file.relative_to(source).as_posix()).write_bytes(content)


class GrowingFiles:
    """The files of a run that grow row by row, such as metrics.jsonl, which no bucket can append to.

    On a local disk they are written in place. For a bucket they are written on this machine, and those that
    have grown are copied whole, at most once a minute, and whenever the run asks for it.

    Attributes:
        folder: the local folder to write in.
    """

    def __init__(self, folder: AnyPath):
        self.folder = Path(folder)
        self._bucket = folder if isinstance(folder, BucketPath) else None
        self._open = contextlib.ExitStack()
        if self._bucket:
            temporary = tempfile.TemporaryDirectory(prefix="lit_jax-")
            self.folder = Path(self._open.enter_context(temporary))
            self._pool = self._open.enter_context(ThreadPoolExecutor(1))
        self._copied: dict[Path, int] = {}
        self._next = time.monotonic() + _COPY_SECONDS
        self._copying: Future[None] | None = None

    def copy_if_due(self) -> None:
        """Start to copy, after a minute. A failure is only reported, because another copy follows."""
        if not self._bucket or time.monotonic() < self._next:
            return
        if self._copying:
            if not self._copying.done():
                return
            try:
                self._copying.result()
            except OSError as error:
                reason = error.strerror or error
                log.warning(
                    "%s could not be written (%s); it is tried again.", self._bucket, reason
                )
        self._next = time.monotonic() + _COPY_SECONDS
        self._copying = self._pool.submit(self._copy)

    def copy(self) -> None:
        """Copy all that was written; return when it is in the bucket. Raise OSError if the store fails."""
        if self._bucket:
            if self._copying:
                # Its error does not count, because all of it is copied now.
                wait([self._copying])
            self._copying = None
            self._copy()
            self._next = time.monotonic() + _COPY_SECONDS

    def close(self) -> None:
        """Copy for the last time, and remove the local folder."""
        with self._open:
            self.copy()

    def _copy(self) -> None:
        assert self._bucket
        # In order, because a reader of several files goes on to the next one for good.
        sizes = {f: f.stat().st_size for f in sorted(self.folder.rglob("*")) if f.is_file()}
        changed = {file: size for file, size in sizes.items() if self._copied.get(file) != size}
        _upload(self.folder, self._bucket, changed)
        self._copied = sizes
