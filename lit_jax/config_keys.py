"""The names of the config's keys, and which of them a mistyped one stands for."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin, get_type_hints


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'" for a mistyped name, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"


def nearest_key(root: Any, where: str, key: str) -> str:
    """Return "did you mean 'x'" for a key that the group `where` lacks, or the list of what the group holds.

    Keys of other groups count, too: the learning rate is one of `schedule`, not of `optimizer`.

    Args:
        root: the dataclass of the whole config.
        where: the path of the group, such as 'config.optimizer'.
        key: the unknown name in it, with those below it if there are any.
    """
    paths = dict(_keys(root, "config"))
    own = [path.rpartition(".")[2] for path in paths if _group(path) == _as_dict_key(where, paths)]
    if elsewhere := namesakes(root, key):
        return "did you mean " + " or ".join(map(repr, elsewhere))
    key = key.partition(".")[0]
    if difflib.get_close_matches(key, own, n=1):
        return nearest(key, own)
    # Of so many names one is always a little like it: only a mistyped one counts, not 'eps' for 'steps'.
    close = difflib.get_close_matches(
        key, {path.rpartition(".")[2] for path in paths}, n=1, cutoff=0.8
    )
    if close:
        return "did you mean " + " or ".join(map(repr, namesakes(root, close[0])))
    return nearest(key, own)


def namesakes(root: Any, key: str) -> list[str]:
    """Return the paths of at most three keys that have this name, or that end with these names."""
    paths = dict(_keys(root, "config"))
    found = [path for path in paths if path.endswith(f".{key}")]
    # Numbers and texts before lists of rules, which name the same thing for single parameters; then the
    # ones that lie highest.
    return sorted(found, key=lambda path: (get_origin(paths[path]) is tuple, path.count(".")))[:3]


# Stands for the names that a user gives to members of a dict.
_NAME = "NAME"


def _keys(kind: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the type of each key and group below a dataclass."""
    for key, hint in get_type_hints(kind).items():
        path = f"{where}.{key}"
        yield path, hint
        if get_origin(hint) is dict:
            path, hint = f"{path}.{_NAME}", get_args(hint)[1]
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, path)


def _group(path: str) -> str:
    return path.rpartition(".")[0]


def _as_dict_key(where: str, paths: Iterable[str]) -> str:
    """Return the path of a group with `_NAME` in the place of a member's own name."""
    parts, known = where.split("."), {*paths, *map(_group, paths)}
    for at in range(1, len(parts) + 1):
        if ".".join(parts[:at]) not in known:
            parts[at - 1] = _NAME
    return ".".join(parts)
