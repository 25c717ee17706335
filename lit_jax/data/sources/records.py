"""Data that was converted to the project's own records."""

import dataclasses
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.records import decode, read_manifest
from lit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What ArrayRecord calls a file instruction: so it need not open the file to know its length."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """A folder with records.json. Raises UserError if a shard that it lists is missing or empty."""

    def __init__(self, folder: Path):
        shards = [shard for shard in read_manifest(folder) if shard.count]
        for shard in shards:
            file = folder / shard.name
            if not file.is_file() or not file.stat().st_size:
                raise UserError(f"The shard {file} is missing or empty; convert the data again.")
        self._folder = folder
        instructions: list[Any] = [
            _Shard(str(folder / s.name), 0, s.count, s.count) for s in shards
        ]
        self._records = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except Exception as error:  # the reader lets through whatever a damaged file makes it raise
            raise BadSampleError(
                f"record {index} of {self._folder} cannot be read ({error})"
            ) from error
        return decode(record)
