"""Where the samples of tar files are: found by one pass over the files, and kept for the next time.

The index is one Arrow file that is mapped into memory: opening it costs the same for a thousand samples and
for a billion. It lies beside the tar files or, where nothing can be written, in the user's cache folder; when
the size or the time of a tar file changes, it is made again.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lit_jax.data.files import File, readable, signature
from lit_jax.data.sources.lists import IMAGE_SUFFIXES
from lit_jax.errors import UserError
from lit_jax.files import whole

log = logging.getLogger(__name__)

VERSION = 1
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
    """The samples of all files in their order. To worker processes goes only where it is kept."""

    def __init__(self, path: Path):
        self._path = path
        # One batch: so that a column is one piece and a sample is found at once.
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self.about = reader.schema.metadata
            shard, self._key, self._hostile, *spans = reader.get_batch(0).columns
        self._numbers = [column.to_numpy() for column in (shard, *spans)]  # no copies

    def __reduce__(self):
        return TarIndex, (self._path,)

    def __len__(self) -> int:
        return len(self._key)

    def __getitem__(self, index: int) -> Sample:
        shard, start, stop, *spans = (column.item(index) for column in self._numbers)
        key, hostile = self._key[index].as_py(), self._hostile[index].as_py()
        return Sample(
            shard, key, hostile, start, stop, [*zip(spans[::2], spans[1::2], strict=True)]
        )


def open_index(files: Sequence[File]) -> TarIndex:
    """The index of these files, made now if it is not there or not of today.

    Raises UserError if a file cannot be read, or if there is no place for the index.
    """
    with ThreadPoolExecutor(16) as pool:
        try:
            signatures = list(pool.map(signature, files))
        except OSError as error:
            raise UserError(f"{error}; a shard of the data set cannot be read.") from error
        about = {b"lit_jax": json.dumps([VERSION, signatures]).encode()}
        places = _places(files)
        for place in places:
            if (found := _open(place)) and found.about == about:
                return found
        log.info("The samples of %d tar files are being indexed.", len(files))
        batches = list(pool.map(_scan, range(len(files)), files))
    table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
    return _write(table.replace_schema_metadata(about), places)


def _places(files: Sequence[File]) -> list[Path]:
    """Where the index of these files may lie, best first."""
    names = "\n".join(str(file) for file in files)
    name = f"lit_jax-index-{hashlib.sha256(names.encode()).hexdigest()[:16]}.arrow"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_jax"
    beside = [files[0].parent] if isinstance(files[0], Path) else []
    return [folder / name for folder in (*beside, cache)]


def _open(place: Path) -> TarIndex | None:
    try:
        return TarIndex(place)
    except (OSError, pa.ArrowException):
        return None


def _write(table: pa.Table, places: Sequence[Path]) -> TarIndex:
    """Several processes may do it at once: each writes a whole file, and they are the same."""
    problem = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole(place) as new, pa.ipc.new_file(str(new), table.schema) as writer:
                batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
                writer.write_batch(batches[0])
            return TarIndex(place)
        except OSError as error:
            problem = error
    raise UserError(
        f"The index of the tar files can be written to none of {', '.join(map(str, places))} ({problem}); "
        "set XDG_CACHE_HOME to a folder with space."
    )


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
