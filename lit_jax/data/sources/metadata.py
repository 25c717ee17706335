"""Tables whose columns are called as other tools call them.

metadata.jsonl, metadata.csv and metadata.parquet lie in the image folders of Hugging Face's `datasets`, with
a column "file_name" and captions in any other, "text" in most.
"""

import csv
import dataclasses
import json
from collections.abc import Collection

from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.files import File, read
from lit_jax.files import parse_json

# Key of a source -> names of what it names elsewhere, if nothing is called like its default.
_OTHER_NAMES = {"image_key": ("file_name",), "caption_key": ("captions", "text")}
_HEAD_BYTES = 1 << 20


def with_names_of(file: File, config: SourceConfig) -> SourceConfig:
    """Return the config of a source with the names of a file's columns, where the user has set none."""
    names = _names(file)
    changed = {}
    for key, others in _OTHER_NAMES.items():
        default = getattr(SourceConfig, key)
        found = next((name for name in others if name in names), None)
        if getattr(config, key) == default and default not in names and found:
            changed[key] = found
    return dataclasses.replace(config, **changed)


def _names(file: File) -> Collection[str]:
    """Return the names of a table's columns; none if it is damaged, which its reader says better."""
    if file.suffix == ".parquet":
        with file.open("rb") as opened:
            return parquet.read_schema(opened).names
    try:
        head = read(file, 0, _HEAD_BYTES).decode("utf-8-sig", "replace").strip()
        if file.suffix == ".json":
            row, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").strip())
            return row
        line = head.split("\n")[0]
        return parse_json(line) if file.suffix == ".jsonl" else next(csv.reader([line]), [])
    except (ValueError, RecursionError, csv.Error):
        return ()
