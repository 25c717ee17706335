"""The names of stacked parameters in a run folder, which do not depend on where a lock cuts the stacks.

A model that locks the blocks before block 8 has the stacks `layer` and `layer_from_8`, because an array
either trains or is locked. In `frozen/` and in checkpoints both have the name of the uncut stack, `layer`;
each of the two holds the blocks of its own part. parameters.txt names these blocks.
"""

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.trees import STACK, flatten, unflatten

# The paths of the stacks of an uncut model, such as 'vision_model/encoder/layer'.
UncutStacks = Collection[str]


def uncut_stacks(shapes: Mapping[str, Any]) -> frozenset[str]:
    """Return the paths of the stacks among the parameters of an uncut model."""
    found = (STACK.fullmatch(path) for path in flatten(shapes))
    return frozenset(stack.string[: stack.start("below") - 1] for stack in found if stack)


def join_stacks(tree: Any, uncut: UncutStacks) -> Any:
    """Return a tree with one array for the parts of each stack, under the name of the uncut stack.

    `tree` has trees of parameters at any depth, as an optimizer's state has. Its leaves are arrays or shapes
    with shardings. A stack with a single part is only renamed. Otherwise the blocks of its parts, in
    ascending order, are copied into one array with the sharding of a part.
    """

    def joined(params: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        flat = flatten(params)
        return unflatten({name: _join([flat[part] for part in of]) for name, of in names.items()})

    return _map_cut(joined, uncut, tree)


def cut_stacks(joined: Any, uncut: UncutStacks, like: Any) -> Any:
    """Return the tree of which `joined` is the result of `join_stacks`.

    `like` has the names, shapes and shardings of the result. A tree that has these names already stays as it
    is.
    """

    def cut(
        like: Mapping[str, Any], names: Mapping[str, Sequence[str]], joined: Mapping[str, Any]
    ) -> dict[str, Any]:
        wanted, flat, parts = flatten(like), flatten(joined), {}
        if wanted.keys() == flat.keys():
            return dict(joined)
        for name, of in names.items():
            start = 0
            for part in of:
                # Only renamed: the array may have no depth axis, as that of a block outside of a stack.
                if len(of) == 1:
                    parts[part] = flat[name]
                    continue
                stop = start + wanted[part].shape[0]
                sharding = wanted[part].sharding
                parts[part] = _slice(flat[name], start=start, stop=stop, sharding=sharding)
                start = stop
        return unflatten(parts)

    return _map_cut(cut, uncut, like, joined)


def _map_cut(function: Callable[..., Any], uncut: UncutStacks, tree: Any, *others: Any) -> Any:
    """Apply `function` to each outermost dict of a tree that has cut stacks; all else stays as it is.

    `function` gets the dict, the names of the parts by the name of their array, and the corresponding values
    of `others`.
    """

    def mapped(value: Any, *rest: Any) -> Any:
        unchanged = rest[0] if rest else value
        if not isinstance(value, Mapping):
            return unchanged
        flat = flatten(value)
        names = _parts(flat, uncut)
        if any(of != [name] for name, of in names.items()):
            return function(value, names, *rest)
        # Parameters whose names are those of the uncut model already.
        if all(hasattr(leaf, "shape") for leaf in flat.values()):
            return unchanged
        # Some optimizers keep whole states in dicts.
        return {
            key: _map_cut(function, uncut, value[key], *(other[key] for other in rest))
            for key in value
        }

    return jax.tree.map(mapped, tree, *others, is_leaf=lambda value: isinstance(value, Mapping))


def _parts(flat: Mapping[str, Any], uncut: UncutStacks) -> dict[str, list[str]]:
    """Return the paths of the parts of each array of a run folder, by its path, in the blocks' order."""
    parts: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    for path in flat:
        first, name = _uncut_name(path, uncut)
        parts[name].append((first, path))
    names: dict[str, list[str]] = {}
    for name, of in parts.items():
        paths = [path for _, path in sorted(of)]
        if len(paths) == 1 or _can_join([flat[path] for path in paths]):
            names[name] = paths
        # A user's optimizer may have such leaves. They keep the names that depend on the cuts.
        else:
            names |= {path: [path] for path in paths}
    return names


def _uncut_name(path: str, uncut: UncutStacks) -> tuple[int, str]:
    """Return the first block of a stack, and the parameter's path in the uncut stack that has the block."""
    stack = STACK.fullmatch(path)
    if stack is None:
        return 0, path
    first = int(stack["first"] or 0)
    # A family may have several uncut stacks, such as one for each stage.
    starts = [
        int(other["first"] or 0)
        for other in (STACK.fullmatch(f"{name}/x") for name in uncut)
        if other and other["above"] == stack["above"]
    ]
    start = max((start for start in starts if start <= first), default=first)
    return first, f"{stack['above']}{f'_from_{start}' if start else ''}/{stack['below']}"


def _can_join(parts: Sequence[Any]) -> bool:
    """Return whether arrays differ in the length of their first axis alone."""
    # Optimizers have leaves without arrays, and arrays whose shape is not that of their parameter.
    if not all(getattr(part, "shape", ()) for part in parts):
        return False
    return len({(part.shape[1:], part.dtype) for part in parts}) == 1


def _join(parts: Sequence[Any]) -> Any:
    # Only renamed, without a copy.
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)
    return _concatenate(parts, sharding=first.sharding)


# The constraints keep a sharded array sharded: no device sees the whole of it.
@functools.partial(jax.jit, static_argnames="sharding")
def _concatenate(parts: Sequence[jax.Array], *, sharding: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.concatenate(parts), sharding)


@functools.partial(jax.jit, static_argnames=("start", "stop", "sharding"))
def _slice(array: jax.Array, *, start: int, stop: int, sharding: Any) -> jax.Array:
    part = jax.lax.slice_in_dim(array, start, stop)
    return jax.lax.with_sharding_constraint(part, sharding)
