"""Converted data: shards of ArrayRecord, and records.json, the manifest of the shards.

A record is a msgpack map of an Example's fields without those that are None: "key" text, "captions" list of
texts, "image" the bytes of an image file, "label", "teacher_caption" ... The manifest is written last, so a
folder without a manifest is unfinished.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource

from lit_jax.buckets import AnyPath
from lit_jax.data.copies import cached_copies
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File
from lit_jax.errors import UserError
from lit_jax.files import parse_json, write_json

MANIFEST = "records.json"
# The converter lists the samples that it leaves out in this file, beside the records.
BAD_FILE = "bad.jsonl"
# The version of the format of manifest and records.
VERSION = 1
# The type of each field; an absent field counts as None.
_KINDS = {
    "key": str,
    "image": bytes | None,
    "captions": tuple,
    "languages": tuple | None,
    "teacher_caption": str | None,
    "label": str | None,
    "label_problem": str | None,
}
# ArrayRecord compresses records in groups; in a group of one a record is read without its neighbours.
WRITER_OPTIONS = "group_size:1"


class Shard(NamedTuple):
    """A file of converted data."""

    # The file's name in the folder.
    name: str
    # The number of records.
    count: int


def encode(example: Example) -> bytes:
    """Return the record of an example. Raise TypeError if its image is neither bytes nor None."""
    image = example["image"]
    if not isinstance(image, bytes | None):
        raise TypeError(f"the image of a record is bytes or None, not {type(image).__name__}")
    given = {key: value for key, value in example.items() if value is not None}
    # Half a surrogate pair, which cutting an emoji leaves in JSON, is kept as it is.
    return msgpack.packb(given, unicode_errors="surrogatepass")  # pyright: ignore[reportReturnType]


def decode(record: bytes) -> Example:
    """Return the example in a record. Raise BadSampleError if the bytes are not a valid record."""
    try:
        row: Any = msgpack.unpackb(record, unicode_errors="surrogatepass", use_list=False)
        # Fields that were None are not in the record.
        required = {"key": row["key"], "captions": row["captions"], "image": None, "label": None}
        example = Example(**required | row)
    # msgpack's exceptions have no common base class.
    except Exception as error:
        raise BadSampleError(f"not a record ({error!r})") from error
    for name, kind in _KINDS.items():
        if not isinstance(value := example.get(name), kind):
            raise BadSampleError(f'not a record ("{name}" is of type {type(value).__name__})')
    for name in ("captions", "languages"):
        if not all(isinstance(text, str) for text in example.get(name) or ()):
            raise BadSampleError(f'not a record ("{name}" has an item that is not text)')
    if len(example.get("languages") or example["captions"]) != len(example["captions"]):
        raise BadSampleError('not a record ("languages" and captions differ in number)')
    return example


def write_manifest(folder: AnyPath, shards: Sequence[Shard]) -> None:
    """Write the manifest, which makes the folder a data set. All shards have to be complete and closed."""
    manifest = {"version": VERSION, "shards": [shard._asdict() for shard in shards]}
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: File) -> tuple[Shard, ...]:
    """Return the shards in order.

    Raises UserError if the manifest is damaged, has another version or lists no records, and OSError if it
    cannot be read.
    """
    file = folder / MANIFEST
    try:
        manifest: Any = parse_json(file.read_bytes())
        version = manifest["version"]
        shards = tuple(Shard(str(row["name"]), int(row["count"])) for row in manifest["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); convert the data again.") from error
    if version != VERSION:
        raise UserError(
            f"{file} has version {version}, but this lit_jax reads version {VERSION}; convert the data "
            "again."
        )
    # An empty source could never yield a batch.
    if not sum(shard.count for shard in shards):
        raise UserError(f"{file} lists no records; convert a data set that has examples.")
    return shards


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file instruction of ArrayRecord. Its length saves opening every shard at the start."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """The records of a folder with records.json. Raises UserError if a shard is missing or empty.

    Shards in an object store are copied to this machine, since ArrayRecord reads local files alone.
    """

    def __init__(self, folder: File):
        shards = [shard for shard in read_manifest(folder) if shard.count]
        local = cached_copies(folder, (shard.name for shard in shards))
        # ArrayRecord would report a missing shard only when a record in it is read.
        for shard in shards:
            file = local / shard.name
            if not file.is_file() or not file.stat().st_size:
                raise UserError(
                    f"The shard {folder / shard.name} is missing or empty; convert the data again."
                )
        self._folder = folder
        instructions: list[Any] = [_Shard(str(local / s.name), 0, s.count, s.count) for s in shards]
        self._records = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        # A damaged file can raise any exception inside the reader.
        except Exception as error:
            raise BadSampleError(
                f"record {index} of {self._folder} cannot be read ({error})"
            ) from error
        return decode(record)
