"""Folders in a bucket (gs://, s3://), with the interface of pathlib.

An object is there as a whole or not at all, cannot be appended to and cannot be renamed, and there are no
folders: a folder is the common beginning of some names. fsspec's clients do the work, gcsfs and s3fs.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath.gpath import PosixGPath

from lit_jax.credentials import hide_keys
from lit_jax.errors import UserError

# epath would leave an address to TensorFlow wherever that is installed, with credentials of its own.
os.environ["EPATH_USE_TF"] = "false"
# gcsfs would ask another service for the kind of a bucket at each call, until that service answers.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# scheme -> (package of the client, extra of lit_jax that has the package, way to give credentials).
_CLIENTS = {
    "gs": (
        "gcsfs",
        "gcs",
        "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "s3": ("s3fs", "s3", "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"),
}
# Fields of TensorStore's spec -> the environment variables of other clients of S3.
_S3_VARIABLES = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
# Orbax writes this file last, so that a checkpoint without the file is not complete.
COMMIT_FILE = "commit_success.txt"
# The longest wait for an answer to TensorStore before a run starts.
_CHECK_SECONDS = 30.0
# The time between two copies of files that grow.
_COPY_SECONDS = 60.0

# Functions to call before each change below a folder; see `guarded`.
_guards: dict["BucketPath", Callable[[], None]] = {}


@epath.register_path_cls([f"{scheme}://" for scheme in _CLIENTS])
class BucketPath(PosixGPath):
    """A path in a bucket. Orbax and JAX use this class, too, for the addresses that they get."""

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return the path itself, because an address is absolute and has no links."""
        return self

    def exists(self) -> bool:
        """Return whether there is an object, or objects below this path. Raise OSError if nobody tells."""
        return _kind(self) is not None

    def is_dir(self) -> bool:
        """Return whether there are objects below this path. Raise OSError if nobody tells."""
        return _kind(self) == "directory"

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield the paths directly below this path, none if there are no objects."""
        # Orbax lists the checkpoints after it has removed one that was not complete, perhaps the only one.
        with contextlib.suppress(FileNotFoundError):
            yield from super().iterdir()

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with its first object."""

    def read_bytes(self) -> bytes:
        """Return the content of an object, by one request."""
        with _os_errors(self):
            return _client(self).cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        """Return the text of an object in UTF-8, by one request."""
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Write an object, by one request, so that readers see the old content or the new one."""
        self._check_guards()
        with _os_errors(self):
            _client(self).pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write an object in UTF-8, by one request."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object, by one request."""
        self._check_guards()
        try:
            with _os_errors(self):
                _client(self).rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects below this path."""
        # A kill in the middle must not leave a part of a checkpoint that looks complete.
        (self / COMMIT_FILE).unlink(missing_ok=True)
        with _os_errors(self):
            super().rmtree(missing_ok=missing_ok)

    def open(self, mode: str = "r", **options: Any) -> Any:
        """Open an object as a stream."""
        if mode.strip("rbt"):
            self._check_guards()
        return super().open(mode, **options)

    def _check_guards(self) -> None:
        for folder, check in list(_guards.items()):
            if self.is_relative_to(folder):
                check()


AnyPath = Path | BucketPath


@contextlib.contextmanager
def guarded(folder: BucketPath, check: Callable[[], None]) -> Iterator[None]:
    """Call a function before each change of an object below a folder, while this is open.

    An error of the function keeps the change from happening. On a disk Orbax writes into a folder with a name
    of its own, but in a bucket into the folder of the checkpoint, where another run may write by then.
    """
    _guards[folder] = check
    try:
        yield
    finally:
        del _guards[folder]


@contextlib.contextmanager
def _os_errors(path: BucketPath) -> Iterator[None]:
    """Raise OSError for whatever a client raises, because that is what the file system of a disk raises."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(path)) from error
    except Exception as error:
        raise OSError(errno.EIO, _reason(error), str(path)) from error


def _reason(error: Exception) -> str:
    """Return the reason of an error of a client, short enough for a sentence."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    # TensorStore's message quotes the whole answer, in brackets.
    return text.strip().partition("\n")[0].partition(" [")[0][:300] or type(error).__name__


def _kind(path: BucketPath) -> str | None:
    """Return "file" or "directory", None if there is nothing."""
    try:
        with _os_errors(path):
            return _client(path).info(str(path))["type"]
    except FileNotFoundError:
        return None


def is_bucket(text: str) -> bool:
    """Return whether a text is an address in a bucket that `bucket_path` accepts by its scheme."""
    return text.partition("://")[0] in _CLIENTS and "://" in text


def bucket_path(name: str, text: str) -> BucketPath:
    """Return the path of the address in the flag or key `name`; nothing is asked of the bucket yet.

    Raise UserError if the address has no bucket or no path, or if its client is not installed.
    """
    scheme, _, rest = text.partition("://")
    package, extra, _ = _CLIENTS[scheme]
    bucket, _, inside = rest.partition("/")
    if (
        not bucket
        or not inside.strip("/")
        or any(c in rest for c in "#@")
        or ".." in rest.split("/")
    ):
        raise UserError(
            f"{name}={hide_keys(text)} is not the address of a folder in a bucket; give "
            f"{scheme}://BUCKET/PATH, without keys, #, @ and .. in it."
        )
    if not importlib.util.find_spec(package):
        raise UserError(
            f"{name}={text} needs the package {package}, which is not installed; run pip install "
            f"'lit_jax[{extra}]', or give a path on this machine."
        )
    from fsspec.config import conf

    # Other processes and TensorStore write into the same folders, so a listing is never remembered.
    conf.setdefault(scheme, {})["use_listings_cache"] = False
    path = epath.Path(text)
    assert isinstance(path, BucketPath)
    return path


def _client(path: BucketPath) -> Any:
    """Return fsspec's client for a path; it is the one that epath uses."""
    return _open_client(path.as_uri().partition("://")[0])


@functools.cache
def _open_client(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme, **({"finalize_on_close": True} if scheme == "gs" else {}))


def key_value_store(folder: BucketPath) -> dict[str, Any]:
    """Return TensorStore's spec of a folder.

    TensorStore itself does not look for S3's endpoint and region where other clients find them.
    """
    _, scheme, bucket, *parts = folder.parts
    driver = "gcs" if scheme == "gs" else scheme
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": "/".join([*parts, ""])}
    if scheme == "s3":
        for key, variables in _S3_VARIABLES.items():
            if given := next(filter(None, map(os.environ.get, variables)), None):
                spec[key] = given
        # TensorStore cannot ask another store than Amazon's for the region.
        if "endpoint" in spec:
            spec.setdefault("aws_region", "us-east-1")
        # Without this TensorStore also looks for files in the home folder, and complains that there are none.
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def check_access(folder: AnyPath) -> None:
    """Raise UserError unless all clients can write, read and remove an object in a folder of a bucket.

    fsspec and TensorStore look for credentials of their own. A local folder is not checked.
    """
    if not isinstance(folder, BucketPath):
        return
    scheme, bucket = folder.parts[1:3]
    probe = folder / f".access-{uuid.uuid4().hex}"
    for client, check in (("fsspec", _check_fsspec), ("TensorStore", _check_tensorstore)):
        try:
            check(probe)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: {client} finds no bucket {bucket}; create it, or give another address."
            ) from error
        # Each client has exceptions of its own.
        except Exception as error:
            reason = _reason(error)
            raise UserError(
                f"{folder}: {client} cannot write, read and remove objects there ({reason}); "
                f"{_CLIENTS[scheme][2]}, for an account that may do all three."
            ) from error


def _check_fsspec(probe: BucketPath) -> None:
    probe.write_bytes(b"lit_jax")
    if probe.read_bytes() != b"lit_jax":
        raise OSError("another content is read than was written")
    probe.unlink()
    # Orbax asks for the properties of the bucket before it lists or removes checkpoints.
    if probe.parts[1] == "gs":
        from google.cloud import storage

        storage.Client().get_bucket(probe.parts[2])


def _check_tensorstore(probe: BucketPath) -> None:
    import tensorstore as ts

    store = ts.KvStore.open(key_value_store(probe.parent)).result()
    # TensorStore itself tries for minutes, with some errors for ever.
    store.write(probe.name, b"lit_jax").result(timeout=_CHECK_SECONDS)
    if store.read(probe.name).result(timeout=_CHECK_SECONDS).value != b"lit_jax":
        raise OSError("another content is read than was written")
    store.write(probe.name, None).result(timeout=_CHECK_SECONDS)


def subfolders(folder: AnyPath) -> list[AnyPath]:
    """Return the folders directly in a folder, none if it does not exist."""
    if isinstance(folder, Path):
        return [path for path in folder.glob("*") if path.is_dir()]
    try:
        with _os_errors(folder):
            found = _client(folder).ls(str(folder), detail=True)
    except FileNotFoundError:
        return []
    return [folder / Path(one["name"]).name for one in found if one["type"] == "directory"]


def remove_folder(folder: AnyPath) -> None:
    """Remove a folder with all that it holds, if it exists."""
    if isinstance(folder, BucketPath):
        folder.rmtree(missing_ok=True)
    elif folder.exists():
        shutil.rmtree(folder)


# Removed when this process ends.
_copies: list[tempfile.TemporaryDirectory[str]] = []


def local_copy(folder: AnyPath) -> Path:
    """Return a folder on this machine with the files of `folder`: the folder itself, or a copy of a bucket's.

    A copy is removed when this process ends.
    """
    if isinstance(folder, Path):
        return folder
    _copies.append(tempfile.TemporaryDirectory(prefix="lit_jax-"))
    copy, start = Path(_copies[-1].name), str(folder).partition("://")[2]
    with _os_errors(folder):
        names = [name.removeprefix(f"{start}/") for name in _client(folder).find(str(folder))]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            sources = [f"{folder}/{name}" for name in names]
            _client(folder).get(sources, [str(copy / name) for name in names])
    return copy


@contextlib.contextmanager
def written_locally(folder: AnyPath) -> Iterator[Path]:
    """Yield a folder on this machine, for writers that cannot write to a bucket.

    It is `folder` itself, or an empty folder whose files are uploaded when the block ends without an error.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lit_jax-") as temporary:
        yield Path(temporary)
        _upload(
            Path(temporary), folder, [file for file in Path(temporary).rglob("*") if file.is_file()]
        )


def _upload(source: Path, folder: BucketPath, files: list[Path]) -> None:
    if files:
        targets = [f"{folder}/{file.relative_to(source).as_posix()}" for file in files]
        with _os_errors(folder):
            _client(folder).put([str(file) for file in files], targets)


class GrowingFiles:
    """The files of a run that grow row by row, such as metrics.jsonl, which no bucket can append to.

    On a local disk they are written in place. For a bucket they are written on this machine and copied whole,
    at most once a minute while they grow, and whenever the run asks for it.

    Attributes:
        folder: the local folder to write in.
    """

    def __init__(self, folder: AnyPath):
        self._bucket = folder if isinstance(folder, BucketPath) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="lit_jax-") if self._bucket else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder)
        self._copied: dict[Path, int] = {}
        self._next = time.monotonic() + _COPY_SECONDS
        self._pool = ThreadPoolExecutor(1)
        self._copying: Future[None] | None = None

    def copy_if_due(self) -> None:
        """Start to copy, after a minute; raise the error of the copy before."""
        if not self._bucket or time.monotonic() < self._next:
            return
        if self._copying is None or self._copying.done():
            self._finish()
            self._next = time.monotonic() + _COPY_SECONDS
            self._copying = self._pool.submit(self._copy)

    def copy(self) -> None:
        """Copy all that was written; return when it is in the bucket."""
        if self._bucket:
            self._finish()
            self._copy()
            self._next = time.monotonic() + _COPY_SECONDS

    def close(self) -> None:
        """Copy for the last time, and remove the local folder."""
        try:
            self.copy()
        finally:
            self._pool.shutdown()
            if self._temporary:
                self._temporary.cleanup()

    def _finish(self) -> None:
        copying, self._copying = self._copying, None
        if copying:
            copying.result()

    def _copy(self) -> None:
        assert self._bucket
        files = {f: f.stat().st_size for f in self.folder.rglob("*") if f.is_file()}
        changed = [file for file, size in files.items() if self._copied.get(file) != size]
        _upload(self.folder, self._bucket, changed)
        self._copied = files
