"""What Hugging Face's files call the parameters of each family: one table entry a family.

One kernel has three names. `encoder/layer/mlp/fc2/kernel` in lit_jax holds all layers of any
transformer; its slice [3] is, for a BERT, `encoder.layer.3.output.dense.kernel` in a Flax file and
`encoder.layer.3.output.dense.weight`, transposed, in a torch file.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lit_jax.errors import UserError

Layout = Literal["torch", "flax"]
Renames = tuple[tuple[str, str], ...]  # (regex, replacement), each tried once in this order


class Joined(NamedTuple):
    """Parameters that a file has as one tensor, side by side along their output features."""

    pattern: str  # of a name in the file as it would be; its one group is the member
    replacement: str  # its name in the file as it is
    members: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    architecture: str  # the torch class that has these names
    prefix: str = ""  # of every name of the tower in a file that has a head as well
    modules: Renames = ()  # from our names, dotted, to those of the file
    joined: tuple[Joined, ...] = ()
    aliases: Renames = ()  # from other spellings in files to those above
    pooler: str = r"(?!)"  # regex of the names that only pooling='pooler' has a use for
    ignore: tuple[str, ...] = ()  # regexes of names, without prefix, that no tower has a use for


_VIT = Family(
    architecture="ViTModel",
    prefix="vit.",
    modules=(
        (r"\.attention\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".layernorm_before."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.mlp_norm\.", ".layernorm_after."),
    ),
    aliases=(  # transformers 5, save_pretrained(save_original_format=False)
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    pooler=r"pooler\.",
    ignore=(r"classifier\.", r"decoder\.", r"embeddings\.mask_token$"),
)

_BERT = Family(
    architecture="BertModel",
    prefix="bert.",
    modules=(
        (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".attention.output.LayerNorm."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.mlp_norm\.", ".output.LayerNorm."),
    ),
    aliases=(  # checkpoints that were converted from TensorFlow in 2018
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    pooler=r"pooler\.",
    ignore=(
        r"cls\.",
        r"classifier\.",
        r"qa_outputs\.",
        r"embeddings\.(position|token_type)_ids$",  # buffers of old versions, no parameters
    ),
)

# By the `model_type` of config.json.
FAMILIES: Mapping[str, Family] = {
    "vit": _VIT,
    "deit": dataclasses.replace(
        _VIT,
        architecture="DeiTModel",
        prefix="deit.",
        ignore=(*_VIT.ignore, r"(cls|distillation)_classifier\."),
    ),
    "bert": _BERT,
}

# What joins two towers.
HEADS = Family(architecture="VisionTextDualEncoderModel")

_STACK = "encoder/layer/"  # below it a parameter has a leading depth axis
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
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
    if path.startswith(_STACK):
        depth, *rest = shape
        rest_of_path = path.removeprefix(_STACK)
        paths = [f"{_STACK}{layer}/{rest_of_path}" for layer in range(depth)]
        return [_place(path, family, layout) for path in paths], tuple(rest)
    return [_place(path, family, layout)], shape


def _place(path: str, family: Family, layout: Layout) -> Place:
    name = path.replace("/", ".")
    if layout == "torch":
        module, dot, leaf = name.rpartition(".")
        name = module + dot + (_TORCH_LEAF.get(leaf, leaf) if module else leaf)
    for pattern, replacement in family.modules:
        name = re.sub(pattern, replacement, name)
    for joined in family.joined:
        match = re.search(joined.pattern, name)
        if match and match[1] in joined.members:
            name = re.sub(joined.pattern, joined.replacement, name)
            return Place(name, joined.members.index(match[1]), len(joined.members))
    return Place(name)


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
        tensors[name] = to_file(paths[0], np.asarray(joined), layout)
    return tensors


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
        usual = name.removeprefix(prefix)
        for pattern, replacement in family.aliases:
            usual = re.sub(pattern, replacement, usual)
        if ignore.match(usual):
            result.ignored.append(name)
        elif usual in result.names:
            raise UserError(
                f"The weights have {result.names[usual]} and {name}, two names of one parameter; "
                "save the model again with transformers."
            )
        else:
            result.names[usual] = name
    return result
