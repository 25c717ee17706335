"""Files of data sets, on this machine or in an object store (s3://, gs://), read whole or in part."""

import dataclasses
import errno
import functools
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from pyarrow import fs

from lit_jax.credentials import Keys, get_keys, hide_keys, split_keys
from lit_jax.errors import UserError
from lit_jax.files import expand_home

# Up to the end of the text if the quote that ends it is missing. Possessive: nothing is tried twice.
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+("?)')

# Arrow's own: nothing is said for 15 minutes of a store that does not answer; without a user it is http.
_GOOGLE_DEFAULTS = {"retry_limit_seconds": "60", "scheme": "https"}

# The largest image, or text beside one.
MAX_FILE_BYTES = 1 << 30
# The longest quoted field: a longer one has lost the quote that ends it.
MAX_FIELD_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class ObjectPath:
    """A path in an object store, used like pathlib.Path on this machine. Arrow's own clients do the work."""

    scheme: str  # "s3"
    # The bucket, and the path in it.
    path: PurePosixPath
    # "endpoint_override=..." and so on, see Arrow's URIs; like the user, it may have keys.
    options: str = dataclasses.field(default="", repr=False)
    # "anonymous", or a key with its secret.
    user: str = dataclasses.field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> "ObjectPath":
        return dataclasses.replace(self, path=self.path / name)

    @property
    def parent(self) -> "ObjectPath":
        return dataclasses.replace(self, path=self.path.parent)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def filesystem(self) -> fs.FileSystem:
        return _filesystem(self.scheme, self.user, self.path.parts[0], self.options)

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(str(self.path))

    def is_file(self) -> bool:
        return self.info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self.info().type == fs.FileType.Directory

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield all files in a folder, and its folders: on S3 all, elsewhere those that were made as such."""
        for info in self.filesystem.get_file_info(fs.FileSelector(str(self.path))):
            yield dataclasses.replace(self, path=PurePosixPath(info.path))

    def open(self, mode: str = "rb") -> Any:
        assert mode == "rb"
        return self.filesystem.open_input_file(str(self.path))

    def read_bytes(self) -> bytes:
        with self.open() as opened:
            return opened.read()


File = Path | ObjectPath


class AddressError(ValueError):
    """An address of a known store with options that it does not know. One bad row may have it."""


@functools.cache
def _filesystem(scheme: str, user: str, bucket: str, options: str) -> fs.FileSystem:
    if scheme == "gs":
        given = dict(parse_qsl(options, keep_blank_values=True))
        options = urlencode(_GOOGLE_DEFAULTS | given)
    try:
        found, _ = fs.FileSystem.from_uri(
            f"{scheme}://{user}{'@' if user else ''}{bucket}?{options}"
        )
    except ValueError as error:
        reason = hide_keys(str(error).replace(f"{user}@", "") if user else str(error))
        raise AddressError(f"{scheme}://{bucket} cannot be opened ({reason}).") from None
    return found


def locate(path: str, beside: File | None = None) -> File:
    """Return the file or folder of this name, whether or not it exists.

    An address without user and options has those of `beside`, if that is in the same store.

    Raises UserError if it is in no known store, or in the home folder of an unknown user.
    """
    if "://" not in path:
        return expand_home(path, path)
    clean, keys = split_keys(path)
    scheme, _, rest = clean.partition("://")
    address, _, options = rest.partition("?")
    bucket, slash, inside = address.partition("/")
    nobody, _, bucket = bucket.rpartition("@")
    if scheme not in ("s3", "gs") or not bucket:
        raise UserError(
            f"{hide_keys(path)} is no address that can be read; it is s3://BUCKET/PATH, gs://BUCKET/PATH, or "
            "a path on this machine."
        )
    user = keys.user or nobody
    options = "&".join(filter(None, (options, keys.options)))
    if isinstance(beside, ObjectPath) and beside.scheme == scheme and not user and not options:
        user, options = beside.user, beside.options
    elif keys == Keys() and not user:
        keys = get_keys(path)
        user, options = keys.user, "&".join(filter(None, (options, keys.options)))
    return ObjectPath(scheme, PurePosixPath(bucket + slash + inside), options, user)


def local(location: File, what: str) -> Path:
    """Return `location`. Raise UserError, which names `what`, if it is not on this machine."""
    if isinstance(location, Path):
        return location
    raise UserError(f"{what} is read from local disks alone; copy {location} to one.")


def require_regular(files: Iterable[File]) -> None:
    """Raise UserError at a file on this machine that cannot be read at random: a pipe, a device, a folder."""
    for file in files:
        try:
            mode = file.stat().st_mode if isinstance(file, Path) else stat.S_IFREG
        # The file's reader says more.
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            raise UserError(
                f"{file} is a pipe, a device or a folder; give a file, or the folder that it lies in."
            )


def read_whole(file: File) -> bytes:
    """Return the content of a file that a data set names.

    Raises OSError if there is none, if it is no regular file (a pipe would block, a device such as /dev/zero
    would never end), or if it has more than `MAX_FILE_BYTES`.
    """
    if isinstance(file, Path):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        _check_size(file, status.st_size)
        # Without a size it is empty, or the system would make it up while it is read.
        return file.read_bytes() if status.st_size else b""
    with file.open() as opened:
        _check_size(file, opened.size())
        return opened.read()


def _check_size(file: File, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than {MAX_FILE_BYTES:,}", str(file))


def read(file: File, start: int, stop: int) -> bytes:
    """Return the bytes `start` to `stop` of a file, fewer if it ends before."""
    # After a seek Google's client asks for all bytes to the end.
    if isinstance(file, ObjectPath):
        with file.open() as opened:
            return opened.read_at(stop - start, start)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def signature(file: File) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change, which differ if the content does."""
    if isinstance(file, Path):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    info = file.info()
    return info.size, info.mtime_ns


def read_text(file: File) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark. Raises UnicodeDecodeError."""
    return file.read_bytes().decode("utf-8-sig")


def readable(name: str) -> str:
    r"""Return the name of a file as text: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(file: File) -> File:
    """Return the file, or where it is missing the one whose name is the same text in another normal form.

    macOS and programs on it write the letter é as e and an accent, others as one character.
    """
    if not isinstance(file, Path) or str(file).isascii() or file.exists():
        return file
    found = Path(file.anchor)
    for part in file.relative_to(found).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        there = next((found / form for form in forms if (found / form).exists()), None)
        if there is None:
            return file
        found = there
    return found


def line_offsets(file: File, *, quoted: bool = False, block_bytes: int = 1 << 24) -> np.ndarray:
    """Return int64 offsets of a text file's lines and of its end, without blank lines and a byte order mark.

    Args:
        quoted: whether a line break in a quoted field is part of the line, as in CSV (RFC 4180).

    Raises UserError if a quoted field has no end, in the file or within `MAX_FIELD_BYTES`.
    """
    offsets = [np.zeros(0, np.int64)]
    with file.open("rb") as stream:
        position = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
        stream.seek(position)
        rest, is_last = b"", False
        while not is_last:
            # A line may go on in the next block: only what the last line break ends is taken now.
            block = stream.read(block_bytes)
            is_last, text = not block, rest + block
            ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
            if quoted:
                fields_Fx2, is_open = _quoted_fields(text)
                if is_open and (is_last or len(text) - fields_Fx2[-1, 0] > MAX_FIELD_BYTES):
                    raise UserError(
                        f"{file} has a quoted field without an end at byte {position + fields_Fx2[-1, 0]}; "
                        "close its double quotes."
                    )
                begun, ended = (np.searchsorted(side, ends, side="right") for side in fields_Fx2.T)
                ends = ends[begun == ended]
            whole = int(ends[-1]) + 1 if len(ends) else 0
            offsets.append(_starts(text[:whole], ends) + position)
            position, rest = position + whole, text[whole:]
    offsets.append(_starts(rest, np.zeros(0, np.int64)) + position)
    return np.concatenate([*offsets, [position + len(rest)]])


def _quoted_fields(text: bytes) -> tuple[np.ndarray, bool]:
    """Return int64 Fx2, where each quoted field starts and stops, and whether the last is still open.

    Double quotes that do not begin a field stand for themselves.
    """
    values = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(values == ord('"'))
    before = values[np.maximum(quotes - 1, 0)]
    begins = (quotes == 0) | (before == ord(",")) | (before == ord("\n"))
    fields, stop, is_open = [], 0, False
    for start in quotes[begins].tolist():
        if start >= stop and (match := _QUOTED.match(text, start)):
            stop, is_open = match.end(), not match[1]
            fields.append((start, stop))
    return np.array(fields, np.int64).reshape(-1, 2), is_open


def _starts(text: bytes, ends: np.ndarray) -> np.ndarray:
    """Return the offsets of the lines of a text that have more than white space."""
    if not text:
        return np.zeros(0, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])
    starts = starts[starts < len(text)]
    return starts[np.logical_or.reduceat(np.frombuffer(text, np.uint8) > ord(" "), starts)]


# The first bytes of files that are mistaken for a text in UTF-8.
_OTHER_FILES = {
    b"\xff\xfe\0\0": "is in UTF-32",
    b"\xff\xfe": "is in UTF-16",
    b"\xfe\xff": "is in UTF-16",
    b"PK\x03\x04": "is a ZIP archive, as Excel writes it,",
    b"\x1f\x8b": "is compressed with gzip",
    b"PAR1": "is a Parquet file",
}


def check_text(file: File) -> None:
    """Raise UserError if the first bytes of a file are not those of a text in UTF-8."""
    start = read(file, 0, 64)
    found = next((what for mark, what in _OTHER_FILES.items() if start.startswith(mark)), None)
    if found is None and b"\0" in start:
        # Without a mark: the letters of English have a zero byte beside each.
        zeros = [start[parity::2].count(0) > len(start) // 4 for parity in (0, 1)]
        found = "is in UTF-16, without a byte order mark," if any(zeros) else "holds null bytes"
    if found:
        raise UserError(f"{file} {found} and not a text in UTF-8; save it as a text in UTF-8.")


def encoding_problem(error: UnicodeDecodeError) -> str:
    """Return what is wrong, with the letter that an older encoding has for the byte."""
    byte = error.object[error.start : error.start + 1]
    # Windows-1252 is what programs write that say Latin-1; it has no letter for five bytes.
    letter = byte.decode("cp1252", "replace")
    meant = f", which is {letter!r} in Latin-1 and Windows-1252" if letter != "\ufffd" else ""
    return f"byte 0x{byte.hex()} at position {error.start}{meant}"


class Lines:
    """The lines of a text file, found by their offsets and read when asked for.

    Raises UserError if there is none, or if the file is no text.
    """

    def __init__(self, file: File, *, quoted: bool = False):
        self.file = file
        check_text(file)
        self._offsets = line_offsets(file, quoted=quoted)
        if not len(self):
            raise UserError(f"{file} is empty; it needs a line for each example.")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        """Return a line, with blank ones behind it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._offsets[index : index + 2].tolist()
        return read(self.file, start, stop)

    def blocks(self, start: int = 0, *, block_bytes: int = 1 << 24) -> Iterator[list[bytes]]:
        """Yield all lines from `start` on, in order and many at a time; the file is opened once."""
        with self.file.open("rb") as stream:
            stream.seek(int(self._offsets[start]))
            while start < len(self):
                end = self._offsets[start] + block_bytes
                stop = max(start + 1, int(self._offsets.searchsorted(end, side="right")) - 1)
                bounds = (self._offsets[start : stop + 1] - self._offsets[start]).tolist()
                content = stream.read(bounds[-1])
                yield [content[a:b] for a, b in itertools.pairwise(bounds)]
                start = stop

    def place(self, index: int) -> str:
        """Return the name of a line in messages, by its byte: counting lines would mean reading them."""
        return f"the line at byte {self._offsets[index]} of {self.file}"
