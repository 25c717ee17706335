"""List the files in a tar by its headers, without trusting the headers."""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_jax.data.files import MAX_FILE_BYTES, File, signature
from lit_jax.data.sources.samples import Member

# The most bytes of a long name, or of a pax header.
MAX_HEADER_BYTES = 1 << 24
# The bytes of one request to an object store.
_STORE_BYTES = 1 << 22
# The bytes behind an archive's end that are searched for a second archive.
_END_BYTES = 1 << 16


class _Headers:
    """A file object for tarfile that bounds reads and seeks: a forged header cannot fill the memory."""

    def __init__(self, opened: Any, size: int):
        self._opened = opened
        self._size = size
        self.seek, self.tell = self._seek, opened.tell

    def _seek(self, position: int) -> int:
        if not 0 <= position <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        return self._opened.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims to have {size} bytes")
        return self._opened.read(size)


def tar_members(file: File) -> tuple[list[Member], str]:
    """Return the files in a tar up to a damaged place, and a text about that place, or "" without one.

    Raises OSError or tarfile.TarError if the file cannot be read, or already its first header is damaged.
    """
    size, _ = signature(file)
    members = []
    with file.open("rb") as raw:
        # One large request to a store is faster than a request for each header.
        opened = raw if isinstance(file, Path) else io.BufferedReader(raw, _STORE_BYTES)
        headers: Any = _Headers(opened, size)
        with _opened(headers) as tar:
            try:
                for found in _headers(tar):
                    if not found.isdir():
                        members.append(_member(found, size))
                end = _after_end(headers, tar)
            except tarfile.TarError as error:
                end = str(error)
    return members, f"breaks off after {len(members)} files: {end}" if end else ""


def _opened(headers: Any) -> tarfile.TarFile:
    with _tar_errors():
        return tarfile.open(fileobj=headers, mode="r:")


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers in order. Raise tarfile.ReadError for a damaged header."""
    # A negative size would lead back to an earlier header, and the loop would never end.
    position = -1
    while (found := _next(tar)) is not None:
        if tar.offset <= position:
            raise tarfile.ReadError("a header claims a negative size")
        position = tar.offset
        # tarfile keeps every TarInfo, which for millions of files fills the memory.
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        yield found


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _tar_errors():
        return tar.next()


@contextlib.contextmanager
def _tar_errors() -> Iterator[None]:
    """Turn any exception that a damaged header causes inside tarfile into a TarError."""
    try:
        yield
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"a header is damaged: {error}") from error


def _after_end(headers: Any, tar: tarfile.TarFile) -> str:
    """Return the problem at the place where tarfile stops, or "" if the archive really ends there.

    tarfile also stops silently at a damaged header, and at the end of the first of two concatenated archives.
    """
    headers.seek(tar.offset)
    rest = headers.read(_END_BYTES)
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"the header at byte {tar.offset} is damaged"
    if rest.strip(b"\0"):
        return f"more data follow its end at byte {tar.offset}; if two tar files were joined, split them"
    return "" if rest else "its end-of-archive mark is missing"


def _member(found: tarfile.TarInfo, size: int) -> Member:
    folder, slash, name = found.name.rpartition("/")
    start, stop = found.offset_data, found.offset_data + found.size
    flaw = ""
    # Nothing is ever unpacked, but a member that was made to escape its folder is not trusted as data either.
    if not found.isreg() or found.name.startswith("/") or ".." in found.name.split("/"):
        flaw = "outside"
    elif found.sparse is not None or any(
        key.startswith("GNU.sparse.") for key in found.pax_headers
    ):
        # The size in the header includes the holes, which the tar does not contain.
        flaw = "sparse"
    elif stop > size:
        flaw = "cut"
    elif found.size > MAX_FILE_BYTES:
        flaw = "large"
    return Member(folder + slash, name, start, stop, flaw)
