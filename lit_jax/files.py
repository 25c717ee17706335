"""Checked paths, atomic writes, JSON, and pointers of Git LFS."""

import contextlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_jax.bucket_copies import uploaded
from lit_jax.buckets import AnyPath, BucketPath, bucket_path, is_bucket
from lit_jax.credentials import hide_keys
from lit_jax.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# The most bytes of a file name on Linux and macOS.
_LONGEST_NAME = 255
# Orbax lists the parts of a checkpoint by a glob pattern that begins with the folder's own path. TensorStore
# reads a backslash as a slash, so that it would look for a checkpoint in another folder.
_PATTERN = re.compile(r"[\[\]*?\\]")
_LFS_POINTER = b"version https://git-lfs"


def local_path(name: str, text: str) -> Path:
    """Return the local path in the flag or key `name`; a leading `~` is the home folder.

    Raises UserError for an empty text, as from an unset variable, for an address such as gs://bucket/run, and
    for a path that no file system accepts.
    """
    if not text:
        raise UserError(f"{name} is empty; give a path.")
    if _ADDRESS.match(text):
        raise UserError(
            f"{name}={hide_keys(text)} is an address, but this path must be on a local disk; give a path on "
            "this machine, such as that of a mounted bucket."
        )
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts):
        raise UserError(
            f"{name}={text} has a name of more than {_LONGEST_NAME} bytes, which no file system allows; give "
            "a shorter one."
        )
    if "\0" in text:
        raise UserError(f"{name}={text!r} has a null character; give another path.")
    return expand_home(text, f"{name}={text}")


def any_path(name: str, text: str) -> AnyPath:
    """Return the path in the flag or key `name`: on this machine, or in a bucket (gs://, s3://).

    Raises UserError in the cases of `local_path` and `bucket_path`.
    """
    return bucket_path(name, text) if is_bucket(text) else local_path(name, text)


def expand_home(path: str, subject: str) -> Path:
    """Return the path with a leading `~` replaced by the home folder; `subject` begins the error message.

    Raises UserError if the user or the user's home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{subject} has no home folder ({error}); give a path.") from error


def cache_folder() -> Path:
    """Return lit_jax's folder among the user's caches, which may not exist yet.

    A user without a home folder, as in some containers, gets a folder among the temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "lit_jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"lit_jax-{os.getuid()}"


def output_path(name: str, text: str) -> AnyPath:
    """Return the path to write in the flag or key `name`: on this machine, or in a bucket (gs://, s3://).

    Raises UserError in the cases of `any_path`, and if a library would read the path as a glob pattern.
    """
    path = any_path(name, text)
    try:
        resolved = str(path.resolve())
    # The links form a loop, about which the first write raises an error.
    except (OSError, RuntimeError):
        resolved = str(path.absolute())
    if found := _PATTERN.search(resolved):
        raise UserError(
            f"{name}={text}: the path {resolved} has the character {found[0]}, which the libraries that read "
            "and write there interpret as a pattern or as a slash; give a path without [, ], *, ? and "
            "backslashes."
        )
    return path


@contextlib.contextmanager
def io_errors(
    remedy: str, path: AnyPath | None = None, also: type[Exception] = OSError
) -> Iterator[None]:
    """Turn an error of writing `path` into a UserError with a remedy.

    Without `path` the error itself names the file. `also` is a class of errors to turn besides OSError.
    """
    try:
        yield
    except (OSError, also) as error:
        is_io = isinstance(error, OSError)
        reason = (is_io and error.strerror) or error
        raise UserError(
            f"{path or (is_io and error.filename)} cannot be written ({reason}); {remedy}."
        ) from error


def output_errors(folder: AnyPath) -> contextlib.AbstractContextManager[None]:
    """Turn an error of writing the --output of a resumable command into a UserError.

    Nothing may run on a device in this context: JAX raises RuntimeError, like ArrayRecord.
    """
    remedy = "fix that and run the same command again, which resumes, or choose another --output"
    if isinstance(folder, BucketPath):
        remedy += "; if this machine is full, set TMPDIR to a folder on a larger disk"
    return io_errors(remedy, folder, RuntimeError)


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary local path, whose file replaces `path` when the block ends without an error.

    The temporary path is unique, so that several processes may write the same file at the same time. A killed
    process leaves a hidden file that ends in .new, or a temporary folder if `path` is in a bucket. A link
    stays, and the file behind it is replaced. A device or a pipe is yielded itself.
    """
    if isinstance(path, BucketPath):
        with uploaded(path) as new:
            yield new
        return
    given, path = path, Path(os.path.realpath(path))
    # Root could replace /dev/null by a file, which breaks the whole machine.
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    # The name is cut, so that even the longest one leaves room for the rest.
    new = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.new")
    try:
        yield new
        new.replace(path)
    except OSError as error:
        # The message should name the user's file instead of the temporary one.
        if error.filename in (None, str(new)):
            error.filename = str(given)
        raise
    finally:
        new.unlink(missing_ok=True)


def atomic_write(path: AnyPath, content: str | bytes) -> None:
    """Write a file completely or not at all; a text is encoded in UTF-8."""
    if isinstance(path, BucketPath):
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return
    with atomic_path(path) as new:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def is_lfs_pointer(content: bytes) -> bool:
    """Return whether the content of a file is what a clone without Git LFS has in its place."""
    return content.startswith(_LFS_POINTER)


def refuse_lfs_pointer(file: Path) -> None:
    """Raise UserError if a file is a pointer of Git LFS; do nothing for a file that cannot be read."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if is_lfs_pointer(opened.read(len(_LFS_POINTER))):
            raise UserError(
                f"{file} is a Git LFS pointer without the file's content; run `git lfs pull` in "
                f"{file.parent}."
            )


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text. Raise ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(content)
    # A hostile file needs only a byte for each level.
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def write_json(path: AnyPath, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
