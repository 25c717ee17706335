"""Local copies of files in an object store, for formats whose libraries read local files alone."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from lit_jax.cached_copies import Version, cache_copies
from lit_jax.data.files import File, ObjectPath, server
from lit_jax.errors import UserError

# The bytes of one request.
_BLOCK = 1 << 24


def cached_copies(folder: File, names: Iterable[str]) -> Path:
    """Return a local folder with these files of `folder`: itself, or copies that stay on this machine.

    Raises UserError if a file in a store is missing or cannot be copied, and OSError if the store does not
    answer.
    """
    if isinstance(folder, Path):
        return folder
    names = [*dict.fromkeys(names)]
    for name in names:
        # The names come from files in the store, which must not choose any file of this machine.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{folder} names the file {name!r}, which is outside of it; remove that name."
            )
    with ThreadPoolExecutor(16) as pool:
        versions = pool.map(lambda name: _version(folder / name), names)
        found = {name: one for name, one in zip(names, versions, strict=True) if one}
    # An old copy of a file that has been removed must not take its place.
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{folder}/{missing[0]}, which is a part of the data, is missing; write the data again."
        )
    return cache_copies(str(folder), server(folder), found, functools.partial(_fetch, folder))


def _version(file: ObjectPath) -> Version | None:
    info = file.info()
    return Version(info.size, info.mtime_ns // 10**9) if info.is_file else None


def _fetch(
    folder: ObjectPath, name: str, local: Path, count: Callable[[int], object]
) -> Version | None:
    file = folder / name
    # Arrow would unpack a file whose name ends in .gz.
    with (
        file.filesystem.open_input_stream(str(file.path), compression=None) as source,
        local.open("wb") as target,
    ):
        while block := source.read(_BLOCK):
            target.write(block)
            count(len(block))
    return _version(file)
