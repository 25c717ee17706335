"""Translate our parameter names to those in Hugging Face's files, and back, by the tables of name_tables.py.

The same kernel has three names. `encoder/layer/mlp/fc2/kernel` in lit_jax stacks the layers of a transformer
(the last layer may be a parameter of its own). In files of a BERT its slice [3] is
`encoder.layer.3.output.dense.kernel` (Flax) or `encoder.layer.3.output.dense.weight`, transposed (torch).
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lit_jax.errors import UserError
from lit_jax.trees import BLOCK, STACK, block_paths
from lit_jax.weights.name_tables import Family, FusedWeight, Renames

Layout = Literal["torch", "flax"]

_TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# The axes of a torch weight in the order of a Flax kernel, by number of dimensions: torch's Linear is
# (out, in), its Conv2d (out, in, height, width).
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


class Slot(NamedTuple):
    """The place of a parameter, or of one layer of it, in a file: part `index` of `count` of a tensor.

    `count` is above 1 for a fused weight, such as query, key and value in one tensor.
    """

    name: str
    index: int = 0
    count: int = 1


def target_slots(
    path: str, shape: tuple[int, ...], family: Family, layout: Layout
) -> tuple[list[Slot], tuple[int, ...]]:
    """Return the slots that hold the parameter at `path` of a tower, and the shape of each part.

    A stack of layers has one slot for each layer, any other parameter has one slot.
    """
    # Files have one tensor for each layer, whatever the stacks of the tower.
    slots = [_slot(name, family, layout) for name in block_paths(path, shape)]
    return slots, shape[1:] if STACK.fullmatch(path) else shape


def _slot(path: str, family: Family, layout: Layout) -> Slot:
    name = BLOCK.sub(r"layer/\1/", path).replace("/", ".")
    # torch calls kernels, scales and embeddings "weight"; Flax files have our own leaf names.
    if layout == "torch":
        module, dot, leaf = name.rpartition(".")
        name = module + dot + (_TORCH_LEAF.get(leaf, leaf) if module else leaf)
    name = renamed(name, family.modules)
    for fused in family.fused:
        match = re.search(fused.pattern, name)
        if match and match[1] in fused.members:
            name = re.sub(fused.pattern, fused.replacement, name)
            return Slot(name, fused.members.index(match[1]), len(fused.members))
    return Slot(name)


def renamed(name: str, renames: Renames) -> str:
    """Return the name after all replacements, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def shape_in_file(path: str, shape: tuple[int, ...], slot: Slot, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the tensor in `slot`, where one layer of the parameter at `path` has `shape`."""
    # `broadcast_to` makes a view without memory: only its shape is needed.
    if slot.count > 1:
        shape = (*shape[:-1], shape[-1] * slot.count)
    return to_file(path, np.broadcast_to(0, shape), layout).shape


def from_file(path: str, array: np.ndarray, slot: Slot, layout: Layout) -> np.ndarray:
    """Return a view of the tensor in `slot`, with the axes of the parameter at `path`."""
    axes = _kernel_axes(path, array.ndim, layout)
    array = array.transpose(axes) if axes else array
    return np.split(array, slot.count, axis=-1)[slot.index] if slot.count > 1 else array


def to_file(path: str, array: np.ndarray, layout: Layout) -> np.ndarray:
    """Return a view of one layer of the parameter at `path`, with the axes of a file."""
    axes = _kernel_axes(path, array.ndim, layout)
    return array.transpose(np.argsort(axes)) if axes else array


def _kernel_axes(path: str, ndim: int, layout: Layout) -> tuple[int, ...] | None:
    is_kernel = layout == "torch" and path.endswith("/kernel")
    return _KERNEL_AXES.get(ndim) if is_kernel else None


def to_tensors(
    params: Mapping[str, np.ndarray], family: Family, layout: Layout
) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name, from the parameters of a tower by path."""
    # Members of a fused weight come from several parameters, so all are collected before they are joined.
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[int, str, np.ndarray]]] = collections.defaultdict(list)
    for path, array in sorted(params.items()):
        slots, shape = target_slots(path, array.shape, family, layout)
        for slot, value in zip(slots, array.reshape(len(slots), *shape), strict=True):
            parts[slot.name].append((slot.index, path, value))
    for name, members in parts.items():
        _, paths, values = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        # Kernels of our layout have their output features last, so members are joined along the last axis.
        fused = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
        tensor = to_file(paths[0], np.asarray(fused), layout)
        tensors[name] = tensor.reshape(1) if name in family.vectors else tensor
        if name.endswith(".running_var"):
            # Torch counts the batches. Nothing reads the number, but transformers reports a missing tensor.
            counter = name.replace("running_var", "num_batches_tracked")
            tensors[counter] = np.zeros((), np.int64)
    for name, like in family.placeholders:
        tensors.setdefault(name, tensors[like][:, :0])
    return tensors


def fused_as_in(names: Iterable[str], family: Family) -> Family:
    """Return `family` without the fused weights that are separate tensors in a file with these usual names.

    transformers 5 can save some models with separate tensors.
    """
    names = list(names)

    def is_split(fused: FusedWeight) -> bool:
        matches = (re.search(fused.pattern, name) for name in names)
        return any(match and match[1] in fused.members for match in matches)

    return dataclasses.replace(
        family, fused=tuple(fused for fused in family.fused if not is_split(fused))
    )


class Recognised(NamedTuple):
    """The names of a tower's file.

    Attributes:
        names: usual spelling -> name in the file.
        ignored: the names in the file that a tower does not use.
    """

    names: dict[str, str]
    ignored: list[str]


def recognise(names: Iterable[str], family: Family, *, has_pooler: bool = True) -> Recognised:
    """Return the names of a tower's file by their usual spelling, and the names that a tower ignores.

    Raises UserError if the file has one parameter under two names.
    """
    names = sorted(names)
    # A file of the base model alone has no prefix.
    prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
    # A tower without a pooler ignores the file's pooler instead of failing on it.
    useless = family.ignore if has_pooler else (*family.ignore, family.pooler)
    ignore = re.compile("|".join(useless) or r"(?!)")
    result = Recognised({}, [])
    for name in names:
        usual = renamed(name.removeprefix(prefix), family.aliases)
        # Only names without the prefix belong to a head; with the prefix the same name is the tower's.
        is_of_head = not name.startswith(prefix) and re.match(family.extra_head_names, name)
        if is_of_head or ignore.match(usual):
            result.ignored.append(name)
        elif usual in result.names:
            raise UserError(
                f"The weights have {result.names[usual]} and {name}, two names for the same parameter; save "
                "the model again with transformers."
            )
        else:
            result.names[usual] = name
    return result
