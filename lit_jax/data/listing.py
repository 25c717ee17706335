"""List the files in a folder, and expand a path with braces."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from pyarrow import fs

from lit_jax.data.files import File, ObjectPath, readable
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# Names that operating systems and tools write beside a user's files, apart from names with a leading dot.
SYSTEM_NAMES = frozenset(
    name.casefold()
    for name in (
        # Zip files from a Mac.
        "__MACOSX",
        "__pycache__",
        # Thumbnails of Synology's file servers.
        "@eaDir",
        "#recycle",
        "@Recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    )
)
# The most kinds of files in a message.
MOST_KINDS = 12
# The most names that the braces of a path may expand to.
MAX_NAMES = 1_000_000
# The most braces in a path, which also bounds the recursion.
MAX_BRACES = 20

_NUMBERS = re.compile(r"(-?[0-9]{1,15})\.\.(-?[0-9]{1,15})(?:\.\.(-?[0-9]{1,15}))?")


def is_system(path: str) -> bool:
    """Return whether a path contains the name of a hidden or system file or folder.

    Args:
        path: a relative path with slashes; the parts "." and ".." are not hidden.
    """
    return bool(system_part(path))


def system_part(path: str) -> str:
    """Return the path up to and including its first hidden or system name, or "" if it has none."""
    parts = path.split("/")
    for number, part in enumerate(parts, start=1):
        is_hidden = part.startswith(".") and part not in (".", "..")
        if is_hidden or part.casefold() in SYSTEM_NAMES:
            return "/".join(parts[:number])
    return ""


def walk(folder: File) -> Iterator[str]:
    """Yield the paths of all files and folders in `folder`, at any depth; folders end with a slash.

    Paths are relative to `folder` and have slashes. Hidden and system folders are named, but not entered.

    Raises UserError for a link to one of its own parent folders, OSError for an unreadable folder.
    """
    if isinstance(folder, ObjectPath):
        for info in folder.filesystem.get_file_info(
            fs.FileSelector(str(folder.path), recursive=True)
        ):
            end = "" if info.type == fs.FileType.File else "/"
            yield str(PurePosixPath(info.path).relative_to(folder.path)) + end
        return
    # The folders still to be read: the relative path of each, and the real paths of it and its parents.
    todo: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    seen, again = set(), []
    while todo:
        inside, real_paths = todo.pop()
        # The same folder under several links is allowed, but reported: its files count several times.
        if real_paths[-1] in seen:
            again.append(inside)
        seen.add(real_paths[-1])
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                # `is_dir` follows links, because the folders of classes are often links to the images.
                if not entry.is_dir():
                    yield inside + entry.name
                    continue
                yield (name := f"{inside}{entry.name}/")
                if not is_system(entry.name):
                    todo.append((name, (*real_paths, _real_path(entry, real_paths))))
    if again:
        log.warning(
            "%d folders in %s are also found under another path, through links, and their files count each "
            "time: %s.",
            len(again),
            folder,
            shown(again),
        )


def _real_path(folder: os.DirEntry[str], parents: Sequence[str]) -> str:
    """Return the real path of a folder. Raise UserError if the path contains one of the folder's parents."""
    # Only a link needs `realpath`, which asks the file system about every part of a path.
    if not folder.is_symlink():
        return os.path.join(parents[-1], folder.name)
    real = os.path.realpath(folder.path)
    if any(os.path.commonpath((real, parent)) == real for parent in parents):
        raise UserError(
            f"{folder.path} is a link to {real}, a folder that contains the link, so the list of files would "
            "never end; remove the link."
        )
    return real


def top_folders(paths: Iterable[str]) -> list[str]:
    """Return the top-level folders among the paths that `walk` yields, without hidden and system folders."""
    names = {path.split("/", 1)[0] for path in paths if "/" in path}
    return sorted(name for name in names if not is_system(name))


def shown(names: Iterable[str], most: int = 10) -> str:
    """Return the first `most` of the sorted names for a message, with "..." for the rest."""
    ordered = sorted(names)
    return ", ".join(map(readable, ordered[:most])) + (", ..." if len(ordered) > most else "")


def expand(path: str) -> list[str]:
    """Return the names that a shell expands the braces of a path to.

    'a{00..02}' is a00, a01, a02, and '{a,b}.tar' is a.tar, b.tar. The name of an existing local file or
    folder stands for itself.

    Raises UserError if the braces do not match, name nothing, or stand for more than `MAX_NAMES`.
    """
    # A real file with braces in its name takes precedence over the expansion.
    if not {"{", "}"} & {*path} or os.path.lexists(os.path.expanduser(path)):
        return [path]
    if path.count("{") > MAX_BRACES:
        raise UserError(f"{_braces(path)} are more than {MAX_BRACES}; give the folder instead.")
    return _expanded(path)


def _expanded(path: str) -> list[str]:
    """Return the names in the shell's order: the braces further right vary fastest."""
    start = path.find("{")
    if start < 0:
        if "}" in path:
            raise _malformed(path)
        return [path]
    end = _closing(path, start)
    names = [name for choice in _choices(path[start : end + 1]) for name in _expanded(choice)]
    rests = _expanded(path[end + 1 :])
    # Checked before the product is built, which could fill the memory.
    _check_count(path, len(names) * len(rests))
    return [path[:start] + name + rest for name in names for rest in rests]


def _closing(path: str, start: int) -> int:
    """Return the index of the brace that closes the brace at `start`."""
    depth = 0
    for place in range(start, len(path)):
        depth += {"{": 1, "}": -1}.get(path[place], 0)
        if not depth:
            return place
    raise _malformed(path)


def _choices(braces: str) -> list[str]:
    """Return the alternatives in a pair of braces: the numbers of a range, or the parts between commas."""
    inside = braces[1:-1]
    if numbers := _NUMBERS.fullmatch(inside):
        first, last = numbers[1], numbers[2]
        step = max(1, abs(int(numbers[3] or 1)))
        # As in a shell, a leading zero in either end gives all names the same width.
        padded = any(re.match("-?0[0-9]", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        start, stop = int(first), int(last)
        steps = range(start, stop + 1, step) if start <= stop else range(start, stop - 1, -step)
        _check_count(braces, len(steps))
        return [f"{number:0{width}}" for number in steps]
    choices, depth, begin = [], 0, 0
    for place, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            choices.append(inside[begin:place])
            begin = place + 1
    if not choices:
        raise _malformed(braces)
    return [*choices, inside[begin:]]


def _check_count(path: str, count: int) -> None:
    if count > MAX_NAMES:
        raise UserError(
            f"{_braces(path)} stand for {count:,} names, more than {MAX_NAMES:,}; write a smaller range, or "
            "give the folder instead."
        )


def _malformed(path: str) -> UserError:
    return UserError(
        f"{_braces(path)} are neither a range nor a list; write a range as {{00000..00331}}, and a list as "
        "{a,b}."
    )


def _braces(path: str) -> str:
    """Return the subject of an error's sentence, without the start of an address, which may hold a key."""
    first = re.search("[{}]", path)
    return f"The braces in {path[first.start() if first else 0 :][:60]!r}"
