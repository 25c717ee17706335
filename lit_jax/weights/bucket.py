"""Model folders in a bucket (gs://, s3://), copied once to this machine."""

import fnmatch
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fsspec.callbacks import Callback

from lit_jax.buckets import BucketPath, bucket_path, client, os_errors, server
from lit_jax.cached_copies import Version, cache_copies
from lit_jax.errors import UserError


def cached_model(
    address: str, config_key: str, patterns_for: Callable[[set[str]], Iterable[str]]
) -> pathlib.Path:
    """Return the local folder with the copies of the files of a model in a bucket.

    Args:
        config_key: the key or flag of the address, for messages.
        patterns_for: returns the patterns of the needed files, given the names of all.

    Raises UserError if there is no such folder, or if it cannot be read or copied.
    """
    folder = bucket_path(config_key, address)
    start = f"{str(folder).partition('://')[2].rstrip('/')}/"
    try:
        with os_errors(folder):
            listed = client(folder).find(str(folder), detail=True)
    except OSError as error:
        raise UserError(
            f"{config_key}={address} cannot be read ({error.strerror}); check the address and the "
            "credentials."
        ) from error
    found = {path.removeprefix(start): _version(info) for path, info in listed.items()}
    if f"{start.rstrip('/')}" in found:
        raise UserError(
            f"{config_key} is {address!r}, which is a file; give the folder of a model."
        )
    if not found:
        raise UserError(
            f"{config_key} is {address!r}, and there is no such folder; give the folder of a model."
        )
    # A folder may hold the same weights in several formats, of which only one is worth the copy.
    patterns = [*patterns_for({*found})]
    wanted = {
        name: version
        for name, version in found.items()
        if any(_matches(name, pattern) for pattern in patterns)
    }
    if not wanted:
        raise UserError(
            f"{config_key} is {address!r}, and none of the {len(found)} files there belongs to a model; give "
            "the folder that has the model's config.json."
        )

    def fetch(name: str, local: pathlib.Path, count: Callable[[int], object]) -> Version:
        return _fetch(folder / name, local, count)

    return cache_copies(str(folder), server(folder), wanted, fetch)


class _Counted(Callback):
    """A progress of fsspec's, which is told to a function."""

    def __init__(self, count: Callable[[int], object]):
        super().__init__()
        self._count = count

    def relative_update(self, inc: int = 1) -> None:
        """Count the bytes of a part."""
        self._count(inc)


def _fetch(file: BucketPath, local: pathlib.Path, count: Callable[[int], object]) -> Version:
    with os_errors(file):
        client(file).get_file(str(file), str(local), callback=_Counted(count))
        return _version(client(file).info(str(file)))


def _matches(name: str, pattern: str) -> bool:
    # An asterisk of fnmatch stands for slashes, too, and would match the files of every model below.
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _version(info: Mapping[str, Any]) -> Version:
    # gcsfs and s3fs have a name of their own for the time.
    changed = info.get("mtime") or info["LastModified"]
    return Version(info["size"], int(changed.timestamp()))
