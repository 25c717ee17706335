"""What Hugging Face's files call the parameters of each family: one table entry a family.

One kernel has three names. `encoder/layer/output/dense/kernel` in lit_jax holds all layers; its
slice [3] is `encoder.layer.3.output.dense.kernel` in a Flax file and
`encoder.layer.3.output.dense.weight`, transposed, in a torch file.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lit_jax.errors import UserError

Layout = Literal["torch", "flax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    architecture: str  # the torch class that has these names
    prefix: str  # of every name of the tower in a file that has a head as well
    stack: str  # the sub-tree that holds all layers, on a leading axis
    aliases: tuple[
        tuple[str, str], ...
    ]  # (regex, replacement) that turn other spellings into these
    ignore: tuple[str, ...]  # regexes of names, without prefix, that no tower has a use for


FAMILIES: Mapping[str, Family] = {
    "vit": Family(
        architecture="ViTModel",
        prefix="vit.",
        stack="encoder/layer",
        aliases=(  # transformers 5, save_pretrained(save_original_format=False)
            (r"^layers\.", "encoder.layer."),
            (r"\.attention\.q_proj\.", ".attention.attention.query."),
            (r"\.attention\.k_proj\.", ".attention.attention.key."),
            (r"\.attention\.v_proj\.", ".attention.attention.value."),
            (r"\.attention\.o_proj\.", ".attention.output.dense."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        ),
        ignore=(r"classifier\.", r"decoder\.", r"embeddings\.mask_token$"),
    ),
    "bert": Family(
        architecture="BertModel",
        prefix="bert.",
        stack="encoder/layer",
        aliases=(  # checkpoints that were converted from TensorFlow in 2018
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        ignore=(
            r"cls\.",
            r"classifier\.",
            r"qa_outputs\.",
            r"embeddings\.(position|token_type)_ids$",  # buffers of old versions, no parameters
        ),
    ),
}

_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Axes of a torch weight in the order of a kernel: Linear is (out, in), Conv2d (out, in, height, width).
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


def parts(
    path: str, shape: tuple[int, ...], stacks: Iterable[str]
) -> tuple[list[str], tuple[int, ...]]:
    """The names, in a Flax file, of the tensors that make up the parameter at `path`, and their shape.

    Below one of the `stacks` there is one a layer, elsewhere there is one.
    """
    for stack in stacks:
        if path.startswith(stack + "/"):
            within = path.removeprefix(stack)
            depth, *rest = shape
            return [_dotted(f"{stack}/{layer}{within}") for layer in range(depth)], tuple(rest)
    return [_dotted(path)], shape


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def spelled(name: str, layout: Layout) -> str:
    """The name in a file of `layout` of what a Flax file calls `name`."""
    module, _, leaf = name.rpartition(".")
    if layout == "flax" or not module:
        return name
    return f"{module}.{_TORCH_LEAF.get(leaf, leaf)}"


def from_file(name: str, array: np.ndarray, layout: Layout) -> np.ndarray:
    """A view of an array of a file with the axes of lit_jax; `name` is that of a Flax file."""
    axes = _kernel_axes(name, array.ndim, layout)
    return array.transpose(axes) if axes else array


def to_file(name: str, array: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `from_file`."""
    axes = _kernel_axes(name, array.ndim, layout)
    return array.transpose(np.argsort(axes)) if axes else array


def _kernel_axes(name: str, ndim: int, layout: Layout) -> tuple[int, ...] | None:
    is_kernel = layout == "torch" and name.endswith(".kernel")
    return _KERNEL_AXES.get(ndim) if is_kernel else None


class Recognised(NamedTuple):
    names: dict[str, str]  # usual name -> name in the file
    ignored: list[str]  # names in the file that a tower has no use for


def recognise(names: Iterable[str], family: Family, *, has_pooler: bool) -> Recognised:
    """Takes prefixes and other spellings off the names of a tower's file, and puts aside what it ignores.

    Raises UserError if the file has one parameter under two names.
    """
    names = sorted(names)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
    ignore = re.compile("|".join(family.ignore if has_pooler else (*family.ignore, r"pooler\.")))
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
