"""Nested dicts of parameters by path: 'vision_model/encoder/layer/mlp/fc2/kernel'.

Equal blocks are stacked: below `layer/` a parameter has a leading depth axis. The blocks of `layer/` count
from 0, and those of `layer_from_7/`, a stack behind another one, from 7. Block 11 on its own is `layer_11/`.
A tower may be split into stacks anywhere; rules and files identify a block by its number alone.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

Tree = Mapping[str, Any]

# A parameter in a stack, and one in a single block. The group 'above' ends with `layer`, without the number
# of the first block; 'below' is the path inside a block.
STACK = re.compile(r"(?P<above>(?:.*/)?layer)(?:_from_(?P<first>\d+))?/(?P<below>.*)")
BLOCK = re.compile(r"\blayer_(\d+)/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Return the leaves by path, in the order of the tree."""
    return traverse_util.flatten_dict(tree, sep="/")  # pyright: ignore[reportReturnType]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict from leaves by path; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def block_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the path of each block's part of a parameter, such as '.../layer_3/mlp/fc2/kernel'.

    A parameter outside a stack has a single part, the parameter itself.
    """
    if not (stack := STACK.fullmatch(path)):
        return [path]
    first = int(stack["first"] or 0)
    return [f"{stack['above']}_{first + i}/{stack['below']}" for i in range(shape[0])]


def is_in_block(path: str) -> bool:
    """Return whether a parameter belongs to a block, in a stack or on its own."""
    return bool(STACK.fullmatch(path) or BLOCK.search(path))


def restack(
    params: Tree, shapes: Tree, stack: Callable[[list[Any]], Any] = np.stack
) -> dict[str, Any]:
    """Return the parameters of a tower, split into stacks as in `shapes`, which may have more leaves.

    A parameter with the same path and shape in both is passed on as it is; others are copied by `stack`.
    Raises KeyError for a block that `params` lack.
    """
    flat, wanted = flatten(params), flatten(shapes)
    # Only the blocks whose stacks differ are taken apart: stacking copies gigabytes.
    blocks: dict[str, Any] = {}
    for path, leaf in flat.items():
        if path not in wanted or wanted[path].shape != leaf.shape:
            parts = leaf if STACK.fullmatch(path) else [leaf]
            blocks |= zip(block_paths(path, leaf.shape), parts, strict=True)
    cut = {}
    for path, leaf in wanted.items():
        names = block_paths(path, leaf.shape)
        if names[0] in blocks:
            parts = [blocks[name] for name in names]
            cut[path] = stack(parts) if STACK.fullmatch(path) else parts[0]
    kept = {path: leaf for path, leaf in flat.items() if path in wanted and path not in cut}
    return unflatten(kept | cut)
