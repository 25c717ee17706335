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
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from etils import epath
from etils.epath.backend import Backend, fsspec_backend
from etils.epath.gpath import PosixGPath

from lit_jax.credentials import had_keys, hide_keys
from lit_jax.errors import UserError

# scheme -> (package of the client, way to give credentials).
_CLIENTS = {
    "gs": (
        "gcsfs",
        "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "s3": ("s3fs", "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"),
}
# The error of S3 if the clock of a request is more than 15 minutes off.
_CLOCK = "RequestTimeTooSkewed"
# Fields of TensorStore's spec -> the environment variables of other clients of S3.
_S3_VARIABLES = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
# Orbax writes this file last, so that a checkpoint without the file is not complete.
COMMIT_FILE = "commit_success.txt"
# The beginning of the names of objects that `check_access` writes for a moment.
PROBE = ".access-"
# The longest wait for an answer to TensorStore before a run starts.
_CHECK_SECONDS = 30.0

# The most bytes of an object's name, in both stores, and of a name below the folder of a run.
_LONGEST_NAME = 1024
_LONGEST_BELOW = 224

# The errors of a disk without space, or without space for this user.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

# Functions to call before each change below a folder; see `guarded`.
_guards: dict["BucketPath", Callable[[], None]] = {}


@epath.register_path_cls([f"{scheme}://" for scheme in _CLIENTS])
class BucketPath(PosixGPath):
    """A path in a bucket. Orbax and JAX use this class, too, for the addresses that they get."""

    # epath would leave an address to TensorFlow wherever that is installed, with credentials of its own. Its
    # variable EPATH_USE_TF is read once, at the first use of any path, which may be a local one.
    @property
    def _backend(self) -> Backend:
        return fsspec_backend

    def __reduce__(self):
        """Return how another process makes the path, whose client has to be set up there, too."""
        return _open_path, (str(self),)

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return the path itself, because an address is absolute and has no links."""
        return self

    def exists(self) -> bool:
        """Return whether an object has this path, or lies below it. Raise OSError if the bucket fails."""
        return _kind(self) is not None

    def is_dir(self) -> bool:
        """Return whether there are objects below this path. Raise OSError if the bucket fails."""
        return _kind(self) == "directory"

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield the paths directly below this path, none if there are no objects."""
        # Orbax lists the checkpoints after it has removed one that was not complete, perhaps the only one.
        found: list[BucketPath] = []
        with contextlib.suppress(FileNotFoundError), os_errors(self):
            found = [*super().iterdir()]
        yield from found

    def glob(self, pattern: str) -> Generator["BucketPath", None, None]:
        """Yield the paths below this path that match a pattern. Raise OSError if the bucket fails."""
        with os_errors(self):
            found = [*super().glob(pattern)]
        yield from found

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists as soon as it has an object."""

    def read_bytes(self) -> bytes:
        """Return the content of an object, by one request."""
        with os_errors(self):
            return client(self).cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        """Return the text of an object in UTF-8, by one request."""
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Write an object, by one request, so that readers see the old content or the new one."""
        self.check_guards()
        with os_errors(self):
            client(self).pipe_file(str(self), data)
        return len(data)

    def upload(self, file: Path) -> None:
        """Write an object with the content of a local file, in parts if it is large."""
        self.check_guards()
        with os_errors(self):
            client(self).put_file(str(file), str(self))

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write an object in UTF-8, by one request."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object, by one request."""
        self.check_guards()
        try:
            with os_errors(self):
                client(self).rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects below this path."""
        # A kill in the middle must not leave a part of a checkpoint that looks complete.
        (self / COMMIT_FILE).unlink(missing_ok=True)
        with os_errors(self):
            super().rmtree(missing_ok=missing_ok)

    def open(self, mode: str = "r", **options: Any) -> Any:
        """Open an object as a stream."""
        if mode.strip("rbt"):
            self.check_guards()
        return super().open(mode, **options)

    def check_guards(self) -> None:
        """Call the functions of `guarded` for this path; to be called before each change."""
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
def os_errors(path: BucketPath) -> Iterator[None]:
    """Raise OSError for whatever a client raises, because that is what the file system of a disk raises."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(path)) from error
    except Exception as error:
        # Only the disk of this machine gets full.
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
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
        with os_errors(path):
            return client(path).info(str(path))["type"]
    except FileNotFoundError:
        return None


def is_bucket(text: str) -> bool:
    """Return whether a text is an address in a bucket that `bucket_path` accepts by its scheme."""
    return text.partition("://")[0] in _CLIENTS and "://" in text


def bucket_path(name: str, text: str) -> BucketPath:
    """Return the path of the address in the flag or key `name`; nothing is asked of the bucket yet.

    Raises UserError if the address has no bucket or no path, or if its client is not installed.
    """
    scheme, _, rest = text.partition("://")
    package, _ = _CLIENTS[scheme]
    bucket, _, inside = rest.partition("/")
    if "?" in rest:
        raise UserError(
            f"{name}={hide_keys(text)} has options after a question mark, which this address cannot have; "
            f"remove them, and {_CLIENTS[scheme][1]}. AWS_ENDPOINT_URL names another server of S3."
        )
    if (
        not bucket
        or not inside.strip("/")
        or any(c in rest for c in "#@")
        or ".." in rest.split("/")
        or had_keys(text)
    ):
        raise UserError(
            f"{name}={hide_keys(text)} is not the address of a folder in a bucket; give "
            f"{scheme}://BUCKET/PATH, without keys, #, @ and .. in it. For keys, {_CLIENTS[scheme][1]}."
        )
    # Otherwise the store would refuse the first long name in the middle of a run.
    if len(os.fsencode(inside)) > _LONGEST_NAME - _LONGEST_BELOW:
        raise UserError(
            f"{name}={text} has more than {_LONGEST_NAME - _LONGEST_BELOW} bytes after the bucket, and no "
            f"store accepts names of more than {_LONGEST_NAME} bytes, with those below the folder; give a "
            "shorter one."
        )
    if not importlib.util.find_spec(package):
        raise UserError(
            f"{name}={text} needs the package {package}, which is not installed; run pip install {package}, "
            "or give a path on this machine."
        )
    return _open_path(text)


def _open_path(text: str) -> BucketPath:
    # gcsfs would ask another service for the kind of a bucket at each call, until that service answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec.config import conf

    # Other processes and TensorStore write into the same folders, so a listing is never remembered.
    conf.setdefault(text.partition("://")[0], {})["use_listings_cache"] = False
    path = epath.Path(text)
    assert isinstance(path, BucketPath)
    return path


def client(path: BucketPath) -> Any:
    """Return fsspec's client for a path; it is the one that epath uses."""
    return _open_client(path.as_uri().partition("://")[0])


def server(path: BucketPath) -> str:
    """Return the URL of the server that the client of a path asks."""
    found = client(path)
    url = urlsplit(found.base if path.parts[1] == "gs" else found.s3.meta.endpoint_url)
    return f"{url.scheme}://{url.netloc}"


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


def check_access(folder: AnyPath | None) -> None:
    """Raise UserError unless all clients can write, read and remove an object in a folder of a bucket.

    fsspec and TensorStore look for credentials of their own. A local folder, or None, is not checked.
    """
    if not isinstance(folder, BucketPath):
        return
    scheme, bucket = folder.parts[1:3]
    probe = folder / f"{PROBE}{uuid.uuid4().hex}"
    for library, check in (("fsspec", _check_fsspec), ("TensorStore", _check_tensorstore)):
        try:
            check(probe)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: {library} finds no bucket {bucket}; create it, or give another address."
            ) from error
        # Each library has exceptions of its own.
        except Exception as error:
            reason = _reason(error)
            remedy = f"{_CLIENTS[scheme][1]}, for an account that may do all three"
            if _CLOCK in str(error):
                remedy = "set the clock of this machine"
            raise UserError(
                f"{folder}: {library} cannot write, read and remove objects there ({reason}); {remedy}."
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
        with os_errors(folder):
            found = client(folder).ls(str(folder), detail=True)
    except FileNotFoundError:
        return []
    return [folder / Path(one["name"]).name for one in found if one["type"] == "directory"]


def remove_folder(folder: AnyPath) -> None:
    """Remove a folder with all that it holds, if it exists."""
    if isinstance(folder, BucketPath):
        folder.rmtree(missing_ok=True)
    elif folder.exists():
        shutil.rmtree(folder)
