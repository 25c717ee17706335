"""Files that are there whole or not at all."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name under which to write what takes the place of `path` when the block ends without an error.

    It is of this attempt alone: several processes may write the same file at the same time. What a killed
    one leaves behind is hidden and ends in .new.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        yield new
        new.replace(path)
    except OSError as error:
        if error.filename == str(new):
            error.filename = str(path)  # not that of the file beside it, which nobody knows
        raise
    finally:
        new.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file (a text in UTF-8) whole or not at all."""
    with whole(path) as new:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
