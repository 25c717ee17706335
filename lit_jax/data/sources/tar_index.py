"""Where the samples of tar files are: found by one pass over the files, and kept for the next time.

See `kept` for where it lies, and when it is made again.
"""

import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lit_jax.data.files import File, readable
from lit_jax.data.sources.kept import KeptTable, Shelf
from lit_jax.data.sources.lists import IMAGE_SUFFIXES
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

VERSION = 2
FIELDS = {"image": IMAGE_SUFFIXES, "txt": (".txt",), "json": (".json",), "cls": (".cls",)}
_STORE_BYTES = 1 << 22  # that are read at a time from an object store
_FIELD_OF = {suffix: field for field, suffixes in FIELDS.items() for suffix in suffixes}
_SPANS = [f"{field}_{end}" for field in FIELDS for end in ("start", "stop")]
_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.large_string()),
        ("hostile", pa.bool_()),
        *((name, pa.int64()) for name in ("start", "stop", *_SPANS)),
    ]
)


class Sample(NamedTuple):
    shard: int  # which of the files
    key: str  # the common name of its members
    hostile: bool  # whether a member is a link, or has a name that leads out of the folder
    start: int  # bytes in the file, of all its members
    stop: int
    spans: Sequence[tuple[int, int]]  # of each of FIELDS; -1 if there is none


class TarIndex:
    """The samples of all files in their order."""

    def __init__(self, table: KeptTable):
        self._table = table
        shard, self._key, self._hostile, *spans = table.columns
        self._numbers = [column.to_numpy() for column in (shard, *spans)]  # no copies

    def __reduce__(self):
        return TarIndex, (self._table,)

    def __len__(self) -> int:
        return len(self._key)

    def __getitem__(self, index: int) -> Sample:
        shard, start, stop, *spans = (column.item(index) for column in self._numbers)
        key, hostile = self._key[index].as_py(), self._hostile[index].as_py()
        return Sample(
            shard, key, hostile, start, stop, [*zip(spans[::2], spans[1::2], strict=True)]
        )


def open_index(files: Sequence[File]) -> TarIndex:
    """Return the index of these files, made now if it is not there or not of today.

    Raises UserError if a file cannot be read, or if there is no place for the index.
    """
    try:
        shelf = Shelf(files, [VERSION], kind="index")
    except OSError as error:
        raise UserError(f"{error}; a shard of the data set cannot be read.") from error
    if found := shelf.find():
        return TarIndex(found)
    log.info("The samples of %d tar files are being indexed.", len(files))
    with ThreadPoolExecutor(16) as pool:
        batches = list(pool.map(_scan, range(len(files)), files))
    try:
        return TarIndex(shelf.keep(pa.Table.from_batches(batches, _SCHEMA)))
    except OSError as error:
        places = ", ".join(map(str, shelf.places))
        raise UserError(
            f"The index of the tar files can be written to none of {places} ({error}); set XDG_CACHE_HOME to "
            "a folder with space."
        ) from error


def _scan(shard: int, file: File) -> pa.RecordBatch:
    try:
        with _open_tar(file) as opened:
            rows = list(_samples(shard, file, opened))
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{file} is no tar file that can be read ({error}); get it again or leave it out."
        ) from error
    return pa.RecordBatch.from_pylist(rows, _SCHEMA)


def _open_tar(file: File) -> Any:
    """For a pass over its headers: a request to a store takes longer than the bytes between two of them."""
    opened = file.open("rb")
    return opened if isinstance(file, Path) else io.BufferedReader(opened, _STORE_BYTES)


def _samples(shard: int, file: File, opened: Any) -> Iterator[dict[str, Any]]:
    """The samples of a tar file up to where it breaks off, if it does."""
    current: dict[str, Any] | None = None
    for member in _members(file, opened):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        field = _FIELD_OF.get((dot + suffix).lower())
        if member.isdir() or field is None:
            continue
        key = readable(f"{folder}{slash}{stem}")
        if current is None or current["key"] != key or current[f"{field}_start"] >= 0:
            if current:
                yield current
            current = dict.fromkeys(_SPANS, -1)
            current |= {"shard": shard, "key": key, "hostile": False, "start": member.offset_data}
        stop = member.offset_data + member.size
        current |= {f"{field}_start": member.offset_data, f"{field}_stop": stop, "stop": stop}
        current["hostile"] |= _hostile(member)
    if current:
        yield current


def _members(file: File, opened: Any) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        count = 0
        while True:
            try:
                member = tar.next()
            except tarfile.ReadError as error:
                if not count:
                    raise
                log.warning("%s breaks off after %d files: %s.", file, count, error)
                return
            if member is None:
                return
            count += 1
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  of millions of files it would keep each
            yield member


def _hostile(member: tarfile.TarInfo) -> bool:
    """Nothing is ever unpacked; but what a stranger made to write outside has no place in a training."""
    return not member.isreg() or member.name.startswith("/") or ".." in member.name.split("/")
