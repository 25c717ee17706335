"""From our names of parameters to those in Hugging Face's files, and back, by the tables of name_tables.py.

One kernel has three names. `encoder/layer/mlp/fc2/kernel` in lit_jax holds the layers of any
transformer (the last one may be apart); its slice [3] is, for a BERT, `encoder.layer.3.output.dense.kernel`
in a Flax file and `encoder.layer.3.output.dense.weight`, transposed, in a torch file.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lit_jax.errors import UserError
from lit_jax.trees import BLOCK, STACK
from lit_jax.weights.name_tables import Family, Joined, Renames

Layout = Literal["torch", "flax"]

_TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes of a torch weight in the order of a kernel: Linear is (out, in), Conv2d (out, in, height, width).
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


class Place(NamedTuple):
    """Where a file has a parameter, or one layer of it: part `index` of `count` of a tensor."""

    name: str
    index: int = 0
    count: int = 1


def places(
    path: str, shape: tuple[int, ...], family: Family, layout: Layout
) -> tuple[list[Place], tuple[int, ...]]:
    """Where the tensors that make up the parameter at `path` of a tower are, and their shape.

    Of a stack of layers there is one a layer, of all else there is one.
    """
    if stack := STACK.fullmatch(path):
        depth, *rest = shape
        first = int(stack["first"] or 0)
        paths = [f"{stack['above']}/{first + i}/{stack['below']}" for i in range(depth)]
        return [_place(path, family, layout) for path in paths], tuple(rest)
    return [_place(path, family, layout)], shape


def _place(path: str, family: Family, layout: Layout) -> Place:
    name = BLOCK.sub(r"layer/\1/", path).replace("/", ".")
    if layout == "torch":
        module, dot, leaf = name.rpartition(".")
        name = module + dot + (_TORCH_LEAF.get(leaf, leaf) if module else leaf)
    name = renamed(name, family.modules)
    for joined in family.joined:
        match = re.search(joined.pattern, name)
        if match and match[1] in joined.members:
            name = re.sub(joined.pattern, joined.replacement, name)
            return Place(name, joined.members.index(match[1]), len(joined.members))
    return Place(name)


def renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def in_file(path: str, shape: tuple[int, ...], place: Place, layout: Layout) -> tuple[int, ...]:
    """The shape of the tensor at `place` that has the parameter at `path`, one layer of which has `shape`."""
    if place.count > 1:
        shape = (*shape[:-1], shape[-1] * place.count)
    return to_file(path, np.broadcast_to(0, shape), layout).shape


def from_file(path: str, array: np.ndarray, place: Place, layout: Layout) -> np.ndarray:
    """A view of the tensor at `place`, with the axes of the parameter at `path`."""
    axes = _kernel_axes(path, array.ndim, layout)
    array = array.transpose(axes) if axes else array
    return np.split(array, place.count, axis=-1)[place.index] if place.count > 1 else array


def to_file(path: str, array: np.ndarray, layout: Layout) -> np.ndarray:
    """A view of one layer of the parameter at `path`, with the axes of a file."""
    axes = _kernel_axes(path, array.ndim, layout)
    return array.transpose(np.argsort(axes)) if axes else array


def _kernel_axes(path: str, ndim: int, layout: Layout) -> tuple[int, ...] | None:
    is_kernel = layout == "torch" and path.endswith("/kernel")
    return _KERNEL_AXES.get(ndim) if is_kernel else None


def tensors_of(
    params: Mapping[str, np.ndarray], family: Family, layout: Layout
) -> dict[str, np.ndarray]:
    """The tensors of a file that has the parameters of a tower, by path."""
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[int, str, np.ndarray]]] = collections.defaultdict(list)
    for path, array in sorted(params.items()):
        where, shape = places(path, array.shape, family, layout)
        for place, value in zip(where, array.reshape(len(where), *shape), strict=True):
            parts[place.name].append((place.index, path, value))
    for name, members in parts.items():
        _, paths, values = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        joined = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
        tensor = to_file(paths[0], np.asarray(joined), layout)
        tensors[name] = tensor.reshape(1) if name in family.vectors else tensor
        if name.endswith(".running_var"):
            # Torch counts batches; nothing reads the number, but a file without it counts as incomplete.
            counter = name.replace("running_var", "num_batches_tracked")
            tensors[counter] = np.zeros((), np.int64)
    for name, like in family.empty:
        tensors.setdefault(name, tensors[like][:, :0])
    return tensors


def as_joined_in(names: Iterable[str], family: Family) -> Family:
    """`family`, but what the file of these (usual) names has as tensors of their own is not joined."""
    names = list(names)

    def is_apart(joined: Joined) -> bool:
        matches = (re.search(joined.pattern, name) for name in names)
        return any(match and match[1] in joined.members for match in matches)

    return dataclasses.replace(
        family, joined=tuple(joined for joined in family.joined if not is_apart(joined))
    )


class Recognised(NamedTuple):
    names: dict[str, str]  # usual name -> name in the file
    ignored: list[str]  # names in the file that a tower has no use for


def recognise(names: Iterable[str], family: Family, *, has_pooler: bool = True) -> Recognised:
    """Takes prefixes and other spellings off the names of a tower's file, and puts aside what it ignores.

    Raises UserError if the file has one parameter under two names.
    """
    names = sorted(names)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
    useless = family.ignore if has_pooler else (*family.ignore, family.pooler)
    ignore = re.compile("|".join(useless) or r"(?!)")
    result = Recognised({}, [])
    for name in names:
        usual = renamed(name.removeprefix(prefix), family.aliases)
        of_head = not name.startswith(prefix) and re.match(family.beside, name)
        if of_head or ignore.match(usual):
            result.ignored.append(name)
        elif usual in result.names:
            raise UserError(
                f"The weights have {result.names[usual]} and {name}, two names of one parameter; "
                "save the model again with transformers."
            )
        else:
            result.names[usual] = name
    return result
