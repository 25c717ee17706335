"""Nested dicts of parameters by path: 'vision_model/encoder/layer/mlp/fc2/kernel'."""

import re
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

Tree = Mapping[str, Any]

# Below `layer/` a parameter has a leading depth axis. The layers of it count from 0, those of
# `layer_from_7/`, a stack behind others, from 7. Layer 11, if it is not in a stack, is `layer_11/`.
STACK = re.compile(r"(?P<above>(?:.*/)?layer)(?:_from_(?P<first>\d+))?/(?P<below>.*)")
BLOCK = re.compile(r"\blayer_(\d+)/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Path -> leaf, in the tree's order."""
    return traverse_util.flatten_dict(tree, sep="/")  # pyright: ignore[reportReturnType]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of which `flatten` made `flat`."""
    return traverse_util.unflatten_dict(flat, sep="/")
