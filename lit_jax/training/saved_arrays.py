"""The names and shapes of the arrays in a folder of Orbax, read without the arrays."""

from typing import Any

import orbax.checkpoint as ocp

from lit_jax.buckets import AnyPath
from lit_jax.training.stack_names import UncutStacks, join_stacks


def as_saved(folder: AnyPath, wanted: Any, uncut: UncutStacks, part: str | None = None) -> Any:
    """Return `wanted`, a tree of shapes, with the names under which `folder` has the stacks of blocks.

    Folders of earlier versions have the names of the cut stacks, which are those of `wanted`.

    Args:
        part: the topmost name in the folder below which `wanted` lies.
    """
    joined = join_stacks(wanted, uncut)
    if _flat(joined).keys() == _flat(wanted).keys():
        return wanted
    prefix = () if part is None else (part,)
    names = {(*prefix, *name) for name in _flat(wanted)}
    return wanted if names <= _saved(folder).keys() else joined


def check_shapes(folder: AnyPath, wanted: Any, part: str | None = None) -> None:
    """Raise ValueError at the first array of `folder` (of one `part`) that differs in name or shape.

    Orbax would find the difference, too. But it reads all arrays at once and then abandons the rest, and each
    abandoned coroutine prints a warning when it is collected.
    """
    there, here = (
        {key: leaf.shape for key, leaf in flat.items() if part in (None, key[0])}
        for flat in (_saved(folder), _flat(wanted))
    )
    for key in there | here:
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{'/'.join(key)} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
            )


def _flat(tree: Any) -> dict[Any, Any]:
    return dict(ocp.tree.to_flat_dict(tree))


def _saved(folder: AnyPath) -> dict[Any, Any]:
    # The annotation asks for Orbax's own kind of path, but a pathlib.Path works.
    resolved: Any = folder.resolve()
    return _flat(ocp.PyTreeCheckpointHandler().metadata(resolved).tree)
