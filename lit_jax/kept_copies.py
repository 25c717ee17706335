"""Copies of objects that stay on this machine, for readers that need random access to many small records.

    ~/.cache/lit_jax/copies/gs/BUCKET/PATH/FILE    the same content, size and time of change as the object

A copy gets its name when it is whole, so that a killed command leaves none that looks complete. A copy of
another size or time than the object's is out of date and is replaced. One process copies a folder, and the
others on this machine wait for it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lit_jax.errors import UserError
from lit_jax.files import cache_folder

log = logging.getLogger(__name__)

_THREADS = 16
_ADVICE = "set XDG_CACHE_HOME to a folder on a larger disk, or mount the bucket and give that path"


class Version(NamedTuple):
    """The state of an object: an object of another size or time has another content."""

    # In bytes.
    size: int
    # The time of the last change, in ns since 1970.
    changed: int


# (name, local file, function that counts bytes) -> the version of the object after all of it was copied, None
# if the object is gone.
Fetch = Callable[[str, Path, Callable[[int], object]], Version | None]


def copies_of(folder: str) -> Path:
    """Return the local folder of the copies of a folder in a bucket, which may not exist yet."""
    scheme, _, path = folder.partition("://")
    return cache_folder() / "copies" / scheme / path


def keep_copies(folder: str, versions: Mapping[str, Version], fetch: Fetch) -> Path:
    """Return a local folder with a copy of each object of `versions`, and copy those that are missing.

    Args:
        folder: the address of the folder in a bucket.
        versions: the present version of each object, by its name relative to `folder`.
        fetch: copies an object; an OSError is an error of the bucket or of the disk.

    Raises UserError if there is too little space, or if an object cannot be copied or changes meanwhile.
    """
    home = copies_of(folder)
    try:
        if not _missing(home, versions):
            return home
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home, folder):
            # Another process may have copied them while this one waited.
            if missing := _missing(home, versions):
                _check_space(folder, home, missing)
                _copy(folder, home, missing, fetch)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder} cannot be copied to {home} ({reason}); run the same command again, which copies only "
            f"the files that are missing, or {_ADVICE}."
        ) from error
    return home


def _missing(home: Path, versions: Mapping[str, Version]) -> dict[str, Version]:
    return {name: version for name, version in versions.items() if _of(home / name) != version}


def _of(file: Path) -> Version | None:
    """Return the version of the object that a file is a copy of, None if there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return Version(status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def _locked(home: Path, folder: str) -> Iterator[None]:
    """Hold a lock on a folder of copies. The kernel frees the lock however its holder ends."""
    with (home / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process, which copies %s to %s.", folder, home)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(folder: str, home: Path, missing: Mapping[str, Version]) -> None:
    needed = sum(version.size for version in missing.values())
    # An outdated copy goes only when the new one is whole, so its space does not count.
    if (free := shutil.disk_usage(home).free) < needed:
        raise UserError(
            f"{folder} needs {_megabytes(needed)} for its copies in {home}, where {_megabytes(free)} are "
            f"free; {_ADVICE}."
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
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="copy", mininterval=0.5) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        copied = [
            pool.submit(_copy_one, folder, home, name, version, fetch, bar.update)
            for name, version in missing.items()
        ]
        try:
            for one in copied:
                one.result()
        except BaseException:
            # The first error ends the command, which must not wait for hundreds of other files.
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
    file = home / name
    file.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: the next command, which has the lock, overwrites what a killed one has left.
    new = file.with_name(f".{file.name}.new")
    try:
        # A store may send parts of an old content and of a new one. The size tells of a connection that ended
        # early without an error.
        if fetch(name, new, count) != version or new.stat().st_size != version.size:
            raise UserError(
                f"{folder}/{name} has changed while it was copied; run the same command again when nothing "
                "writes there."
            )
        os.utime(new, ns=(version.changed, version.changed))
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
