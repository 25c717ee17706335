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

# A quoted field of CSV, which runs to the end of the text if its closing quote is missing. The possessive
# quantifiers rule out backtracking, which would be quadratic in the length of an unclosed field.
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+("?)')
# Halves of surrogate pairs but for those that stand for a byte of a file's name (PEP 383).
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")

# Arrow's own defaults do not serve here: silent retries for 15 minutes if the store does not answer, and http
# for anonymous access.
_GOOGLE_DEFAULTS = {"retry_limit_seconds": "60", "scheme": "https"}

# The variables by which Arrow's clients find another server.
_SERVER_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("CLOUD_STORAGE_EMULATOR_ENDPOINT",),
}

# The size limit of an image file, or of the text file beside an image.
MAX_FILE_BYTES = 1 << 30
# The size limit of a quoted field: a longer field has most likely lost its closing quote.
MAX_FIELD_BYTES = 1 << 26
# The bytes of a table that are read at once: few requests to an object store, and little memory.
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class ObjectPath:
    """A path in an object store, with the interface of pathlib.Path. Arrow's clients do the work."""

    # "s3" or "gs".
    scheme: str
    # The bucket, and the path in the bucket.
    path: PurePosixPath
    # "endpoint_override=..." and so on, see Arrow's URIs. Options and user may contain secrets, so neither
    # appears in the repr or in messages.
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
        """Arrow's client of the store, shared by all paths with the same bucket, user and options."""
        return _filesystem(self.scheme, self.user, self.path.parts[0], self.options)

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(str(self.path))

    def is_file(self) -> bool:
        return self.info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self.info().type == fs.FileType.Directory

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield the files and folders in this folder.

        On S3 every common prefix is a folder; other stores list only folders that were created explicitly.
        """
        for info in self.filesystem.get_file_info(fs.FileSelector(str(self.path))):
            yield dataclasses.replace(self, path=PurePosixPath(info.path))

    def open(self, mode: str = "rb") -> Any:
        """Return a seekable binary file of Arrow. Only reading is possible."""
        assert mode == "rb"
        return self.filesystem.open_input_file(str(self.path))

    def read_bytes(self) -> bytes:
        with self.open() as opened:
            return opened.read()


File = Path | ObjectPath


class AddressError(ValueError):
    """An address in a known store with options that the store rejects. A single bad row may contain one."""


@functools.cache
def _filesystem(scheme: str, user: str, bucket: str, options: str) -> fs.FileSystem:
    if scheme == "gs":
        given = dict(parse_qsl(options, keep_blank_values=True))
        options = urlencode(_GOOGLE_DEFAULTS | given)
    address = f"{scheme}://{user}{'@' if user else ''}{bucket}?{options}"
    # A cached client keeps its connections; a new client for each image would reconnect each time.
    try:
        return fs.FileSystem.from_uri(address)[0]
    except ValueError as error:
        reason = hide_keys(str(error).replace(f"{user}@", "") if user else str(error))
        raise AddressError(f"{scheme}://{bucket} cannot be opened ({reason}).") from None


def locate(path: str, beside: File | None = None) -> File:
    """Return the file or folder that `path` names, whether or not it exists.

    An address without user and options inherits those of `beside`, if `beside` is in the same store.

    Raises UserError if the path is in no known store, or in the home folder of an unknown user.
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
            f"{hide_keys(path)} is not an address that lit_jax can read; give s3://BUCKET/PATH, "
            "gs://BUCKET/PATH, or a path on this machine."
        )
    user = keys.user or nobody
    options = "&".join(filter(None, (options, keys.options)))
    # The address's own keys come first, then those of the list that names the file, then remembered keys.
    if isinstance(beside, ObjectPath) and beside.scheme == scheme and not user and not options:
        user, options = beside.user, beside.options
    elif keys == Keys() and not user:
        keys = get_keys(path)
        user, options = keys.user, "&".join(filter(None, (options, keys.options)))
    return ObjectPath(scheme, PurePosixPath(bucket + slash + inside), options, user)


def require_regular(files: Iterable[File]) -> None:
    """Raise UserError at a local file without random access: a pipe, a device or a folder."""
    for file in files:
        try:
            mode = file.stat().st_mode if isinstance(file, Path) else stat.S_IFREG
        # A missing file is not reported here: the file's reader raises a more specific error.
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            raise UserError(
                f"{file} is a pipe, a device or a folder; give a regular file, or the folder that holds it."
            )


def read_whole(file: File) -> bytes:
    """Return the content of a file that a data set names.

    Raises OSError if the file does not exist, if it is not a regular file (a pipe would block, a device such
    as /dev/zero would never end), or if it has more than `MAX_FILE_BYTES`.
    """
    if isinstance(file, Path):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        _check_size(file, status.st_size)
        # A regular file of size 0 is empty, or it lies in /proc and has content of unknown length.
        return file.read_bytes() if status.st_size else b""
    with file.open() as opened:
        _check_size(file, opened.size())
        return opened.read()


def _check_size(file: File, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than {MAX_FILE_BYTES:,}", str(file))


def read(file: File, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to `stop` (exclusive) of a file, or fewer if the file ends before."""
    # Not by `seek` and `read`: after a seek, Google's client requests all bytes to the end of the object.
    if isinstance(file, ObjectPath):
        with file.open() as opened:
            return opened.read_at(stop - start, start)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def signature(file: File) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns, which reveal a changed content."""
    if isinstance(file, Path):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    info = file.info()
    return info.size, info.mtime_ns


def server(file: ObjectPath) -> str:
    """Return the URL of the server that an address or the environment names, "" for Amazon's or Google's."""
    options = dict(parse_qsl(file.options))
    if host := options.get("endpoint_override", ""):
        return host if "://" in host else f"{options.get('scheme', 'https')}://{host}"
    return next(filter(None, map(os.environ.get, _SERVER_VARIABLES[file.scheme])), "")


def read_text(file: File) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Raise UnicodeDecodeError if invalid."""
    return file.read_bytes().decode("utf-8-sig")


def readable(name: str) -> str:
    r"""Return the name of a file as printable text: bytes that are not UTF-8 become \xNN.

    Half of a surrogate pair, as a JSON file may have it in a name, becomes U+FFFD.
    """
    return os.fsencode(_HALVES.sub("\ufffd", name)).decode("utf-8", "backslashreplace")


def find(file: File) -> File:
    """Return the file; if it is missing, the file whose name is the same text in another normal form.

    macOS writes the letter é as two characters (NFD: e and an accent), most other systems as one (NFC).
    """
    if not isinstance(file, Path) or str(file).isascii() or file.exists():
        return file
    found = Path(file.anchor)
    # Each part of the path may be in a different form, so the folders are tried one by one.
    for part in file.relative_to(found).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        there = next((found / form for form in forms if (found / form).exists()), None)
        if there is None:
            return file
        found = there
    return found


def line_offsets(file: File, *, quoted: bool = False, block_bytes: int = _BLOCK) -> np.ndarray:
    """Return the int64 byte offsets of a text file's lines, and of the file's end as the last element.

    Blank lines and a byte order mark are skipped.

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
            # A line may continue in the next block, so the text behind the last line break is carried over.
            block = stream.read(block_bytes)
            is_last, text = not block, rest + block
            ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
            if quoted:
                fields_Fx2, is_open = _quoted_fields(text)
                if is_open and (is_last or len(text) - fields_Fx2[-1, 0] > MAX_FIELD_BYTES):
                    raise UserError(
                        f"{file} has a quoted field that is never closed, at byte "
                        f"{position + fields_Fx2[-1, 0]}; add its closing double quote."
                    )
                # A line break lies outside quotes if as many fields have ended before it as have begun.
                begun, ended = (np.searchsorted(side, ends, side="right") for side in fields_Fx2.T)
                ends = ends[begun == ended]
            whole = int(ends[-1]) + 1 if len(ends) else 0
            offsets.append(_starts(text[:whole], ends) + position)
            position, rest = position + whole, text[whole:]
    offsets.append(_starts(rest, np.zeros(0, np.int64)) + position)
    return np.concatenate([*offsets, [position + len(rest)]])


def _quoted_fields(text: bytes) -> tuple[np.ndarray, bool]:
    """Return (start, stop) of each quoted field as int64 Fx2, and whether the last field is still open.

    A double quote that does not begin a field is an ordinary character.
    """
    values = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(values == ord('"'))
    before = values[np.maximum(quotes - 1, 0)]
    begins = (quotes == 0) | (before == ord(",")) | (before == ord("\n"))
    fields, stop, is_open = [], 0, False
    for start in quotes[begins].tolist():
        # A quote before `stop` lies inside the previous field.
        if start >= stop and (match := _QUOTED.match(text, start)):
            stop, is_open = match.end(), not match[1]
            fields.append((start, stop))
    return np.array(fields, np.int64).reshape(-1, 2), is_open


def _starts(text: bytes, ends: np.ndarray) -> np.ndarray:
    """Return the offsets of a text's lines that contain more than white space."""
    if not text:
        return np.zeros(0, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])
    starts = starts[starts < len(text)]
    # `reduceat` finds lines with a visible byte; all bytes of multi-byte characters are above the space.
    return starts[np.logical_or.reduceat(np.frombuffer(text, np.uint8) > ord(" "), starts)]


# The first bytes of files that users mistake for UTF-8 text. The mark of UTF-32 begins with that of UTF-16,
# so UTF-32 comes first.
_OTHER_FILES = {
    b"\xff\xfe\0\0": "is in UTF-32",
    b"\xff\xfe": "is in UTF-16",
    b"\xfe\xff": "is in UTF-16",
    b"PK\x03\x04": "is a ZIP archive, as Excel writes it",
    b"\x1f\x8b": "is compressed with gzip",
    b"PAR1": "is a Parquet file",
}


def check_text(file: File) -> None:
    """Raise UserError if the first bytes of a file are not those of UTF-8 text."""
    start = read(file, 0, 64)
    found = next((what for mark, what in _OTHER_FILES.items() if start.startswith(mark)), None)
    if found is None and b"\0" in start:
        # UTF-16 without a mark: every Latin letter has a zero byte beside it, all of the same parity.
        zeros = [start[parity::2].count(0) > len(start) // 4 for parity in (0, 1)]
        found = "is in UTF-16 without a byte order mark" if any(zeros) else "holds null bytes"
    if found:
        raise UserError(f"{file} {found}, not text in UTF-8; save it as text in UTF-8.")


def encoding_problem(error: UnicodeDecodeError) -> str:
    """Return the reason of a decoding error, with the letter that the byte means in an older encoding."""
    if mark := next((mark for mark in _OTHER_FILES if error.object.startswith(mark)), b""):
        return f"it {_OTHER_FILES[mark]}"
    byte = error.object[error.start : error.start + 1]
    # Programs that claim to write Latin-1 write Windows-1252, in which five bytes have no letter.
    letter = byte.decode("cp1252", "replace")
    meant = f", which is {letter!r} in Latin-1 and Windows-1252" if letter != "\ufffd" else ""
    return f"byte 0x{byte.hex()} at position {error.start}{meant}"


class Lines:
    """The lines of a text file. Only the offsets are kept in memory; a line is read on access.

    Raises UserError if the file has no lines, or is not UTF-8 text.
    """

    def __init__(self, file: File, *, quoted: bool = False):
        self.file = file
        check_text(file)
        self._offsets = line_offsets(file, quoted=quoted)
        if not len(self):
            raise UserError(f"{file} is empty; write a line for each example.")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        """Return a line, including its line break and the blank lines that follow."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._offsets[index : index + 2].tolist()
        return read(self.file, start, stop)

    def blocks(self, start: int = 0) -> Iterator[list[bytes]]:
        """Yield all lines from `start` on, in order, in lists of about 16 MiB; open the file once."""
        with self.file.open("rb") as stream:
            stream.seek(int(self._offsets[start]))
            while start < len(self):
                end = self._offsets[start] + _BLOCK
                # At least one line, since a line may be longer than a block.
                stop = max(start + 1, int(self._offsets.searchsorted(end, side="right")) - 1)
                bounds = (self._offsets[start : stop + 1] - self._offsets[start]).tolist()
                content = stream.read(bounds[-1])
                yield [content[a:b] for a, b in itertools.pairwise(bounds)]
                start = stop

    def place(self, index: int) -> str:
        """Return the name of a line for messages, by its byte: counting lines takes a pass over the file."""
        return f"the line at byte {self._offsets[index]} of {self.file}"
