"""Copies of objects that stay on this machine, for readers that need random access to many small records.

    ~/.cache/lit_jax/copies/gs/BUCKET/PATH/SERVER-VERSIONS/FILE    the content of the object

SERVER is a digest of the server's address, and VERSIONS one of the name, size and time of change of each
object. A changed object thus makes a new folder, and a running reader of the old one keeps its files.
Unchanged files are hard links to those of an older folder.

A copy gets its name when it is whole, so that a killed command leaves none that looks complete. One process
copies a folder, and the others on this machine wait for it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lit_jax.buckets import FULL_DISK
from lit_jax.errors import UserError
from lit_jax.files import cache_folder

log = logging.getLogger(__name__)

# Downloads at the same time. One connection to a bucket does not fill the network of a machine.
_THREADS = 16
# A few servers have to differ in their digests, but ever new versions of the objects.
_SERVER_DIGITS, _VERSIONS_DIGITS = 8, 16
_MOUNT = "or mount the bucket and give that path"
_LARGER_DISK = f"set XDG_CACHE_HOME to a folder on a larger disk, {_MOUNT}"
# The servers that a client asks if it is given no other.
_STANDARD_SERVERS = ("amazonaws.com", "googleapis.com")


class Version(NamedTuple):
    """The state of an object: an object of another size or time has another content."""

    # In bytes.
    size: int
    # The time of the last change, in whole seconds since 1970, because S3 tells no more in some answers.
    changed: int


class _StoppedError(Exception):
    """The end of a download after the error of another one."""


# (name, local file, function that counts bytes) -> the version of the object after all of it was copied, None
# if the object is gone.
Fetch = Callable[[str, Path, Callable[[int], object]], Version | None]


def cache_path(folder: str, server: str, versions: Mapping[str, Version]) -> Path:
    """Return the local folder of the copies of a bucket's objects, which may not exist yet.

    Args:
        folder: the address of the folder in a bucket.
        server: the URL of the server, or "" for the one of Amazon or Google.
        versions: the version of each object, by its name relative to `folder`.
    """
    scheme, _, path = folder.partition("://")
    # Each client has its own address of the standard server.
    place = "" if server.rstrip("/").endswith(_STANDARD_SERVERS) else server.rstrip("/")
    digests = (
        _digest(place)[:_SERVER_DIGITS],
        _digest(json.dumps(sorted(versions.items())))[:_VERSIONS_DIGITS],
    )
    return cache_folder() / "copies" / scheme / path / "-".join(digests)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def cache_copies(folder: str, server: str, versions: Mapping[str, Version], fetch: Fetch) -> Path:
    """Return a local folder with a copy of each object of `versions` and no other; copy what is missing.

    Args:
        folder: the address of the folder in a bucket.
        server: the URL of the server, or "" for the one of Amazon or Google.
        versions: the present version of each object, by its name relative to `folder`.
        fetch: copies an object; an OSError is an error of the bucket or of the disk.

    Raises UserError if there is too little space, or if an object cannot be copied or changes meanwhile.
    """
    home = cache_path(folder, server, versions)
    try:
        if not _missing(home, versions):
            return home
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home, folder):
            # Another process may have copied them while this one waited.
            _link_unchanged(home, _missing(home, versions))
            if missing := _missing(home, versions):
                _check_space(folder, home, missing)
                _copy(folder, home, missing, fetch)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder} cannot be copied to {home} ({reason}); {_remedy(error, home)}. The same command goes "
            "on with the files that are missing."
        ) from error
    return home


def _remedy(error: OSError, home: Path) -> str:
    if error.errno in FULL_DISK:
        return _LARGER_DISK
    # Errors of a bucket have no file, or the address of one.
    if isinstance(error.filename, str | Path) and "://" not in str(error.filename):
        return f"set XDG_CACHE_HOME to a folder that can be written, {_MOUNT}"
    return "check the network, and the credentials and their permission to read"


def _missing(home: Path, versions: Mapping[str, Version]) -> dict[str, Version]:
    return {name: version for name, version in versions.items() if _of(home / name) != version}


def _of(file: Path) -> Version | None:
    """Return the version of the object that a file is a copy of, None if there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return Version(status.st_size, int(status.st_mtime))


@contextlib.contextmanager
def _locked(home: Path, folder: str) -> Iterator[None]:
    """Hold a lock on all copies of a folder. The kernel frees the lock however its holder ends."""
    with (home.parent / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process, which copies %s to %s.", folder, home.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _link_unchanged(home: Path, missing: Mapping[str, Version]) -> None:
    """Link the files that an older copy from the same server has in the same version."""
    server = home.name[:_SERVER_DIGITS]
    folders = sorted(home.parent.glob(f"{server}-{'[0-9a-f]' * _VERSIONS_DIGITS}"))
    for name, version in missing.items():
        older = (folder / name for folder in folders if folder != home)
        # Some file systems have no links; the object is then copied again.
        with contextlib.suppress(OSError):
            if source := next((file for file in older if _of(file) == version), None):
                with _replacing(home / name) as new:
                    new.hardlink_to(source)


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Yield a path whose file gets the name of `file` when the block ends without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: the next command, which has the lock, removes what a killed one has left. It may be a link
    # to an older copy, so it must not be overwritten.
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _check_space(folder: str, home: Path, missing: Mapping[str, Version]) -> None:
    needed = sum(version.size for version in missing.values())
    if (free := shutil.disk_usage(home).free) < needed:
        raise UserError(
            f"{folder} needs {_megabytes(needed)} for its copies in {home}, where {_megabytes(free)} are "
            f"free; remove older copies from {home.parent}, {_LARGER_DISK}."
        )
    log.info(
        "Copying %d files (%s) of %s to %s, where they stay for later commands; the folder may be removed "
        "when none runs.",
        len(missing),
        _megabytes(needed),
        folder,
        home,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _copy(folder: str, home: Path, missing: Mapping[str, Version], fetch: Fetch) -> None:
    total = sum(version.size for version in missing.values())
    stopped = threading.Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="copy", mininterval=0.5) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):

        def count(size: int) -> None:
            # An error ends this thread's download; the first error is the one that is reported.
            if stopped.is_set():
                raise _StoppedError
            bar.update(size)

        copied = [
            pool.submit(_copy_one, folder, home, name, version, fetch, count)
            for name, version in missing.items()
        ]
        try:
            for one in as_completed(copied):
                one.result()
        except BaseException:
            # The first error ends the command, which must not wait for hundreds of other files, nor for the
            # rest of those that are under way.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_one(
    folder: str,
    home: Path,
    name: str,
    version: Version,
    fetch: Fetch,
    count: Callable[[int], object],
) -> None:
    with _replacing(home / name) as new:
        # A store may send parts of an old content and of a new one.
        if fetch(name, new, count) != version:
            raise UserError(
                f"{folder}/{name} has changed while it was copied; run the same command again when nothing "
                "writes there."
            )
        # A connection may end early without an error.
        if (size := new.stat().st_size) != version.size:
            raise UserError(
                f"{folder}/{name} ended after {size:,} of {version.size:,} bytes; check the network and run "
                "the same command again."
            )
        os.utime(new, (version.changed, version.changed))
