"""Model folders in a bucket (gs://, s3://), copied once to this machine."""

import fnmatch
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lit_jax.buckets import BucketPath, bucket_path, client, os_errors
from lit_jax.errors import UserError
from lit_jax.kept_copies import Version, keep_copies


def bucket_folder(
    address: str, config_key: str, patterns_for: Callable[[set[str]], Iterable[str]]
) -> pathlib.Path:
    """Return the local folder with the copies of the files of a model in a bucket.

    Args:
        config_key: the key or flag of the address, for messages.
        patterns_for: returns the patterns of the needed files, given the names of all.

    Raises UserError if there is no such folder, or if it cannot be read or copied.
    """
    folder = bucket_path(config_key, address)
    start = f"{str(folder).partition('://')[2]}/"
    try:
        with os_errors(folder):
            listed = client(folder).find(str(folder), detail=True)
    except OSError as error:
        raise UserError(
            f"{config_key}={address} cannot be read ({error.strerror}); check the address and the "
            "credentials."
        ) from error
    found = {path.removeprefix(start): _version(info) for path, info in listed.items()}
    if not found:
        raise UserError(
            f"{config_key} is {address!r}, and there is no such folder; give the folder of a model."
        )
    patterns = [*patterns_for({*found})]
    wanted = {
        name: version
        for name, version in found.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }

    def fetch(name: str, local: pathlib.Path, count: Callable[[int], object]) -> Version:
        version = _fetch(folder / name, local)
        count(version.size)
        return version

    return keep_copies(str(folder), wanted, fetch)


def _fetch(file: BucketPath, local: pathlib.Path) -> Version:
    with os_errors(file):
        client(file).get_file(str(file), str(local))
        return _version(client(file).info(str(file)))


def _version(info: Mapping[str, Any]) -> Version:
    # gcsfs and s3fs have a name of their own for the time. Some servers of S3 tell more than seconds in a
    # listing, and seconds elsewhere.
    changed = info.get("mtime") or info["LastModified"]
    return Version(info["size"], int(changed.timestamp()) * 10**9)
