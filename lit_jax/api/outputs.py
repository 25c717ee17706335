"""The outputs of the Python interface: of a tower, with the records of its blocks, and of a dual encoder.

Dims: B inputs (images in a dual encoder), T texts, L tokens, N heads, D width, P pooled width, E embedding.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
from jaxtyping import Array, Float

from lit_jax.models.tower import TowerOutput
from lit_jax.trees import flatten

# The path of a block's records. A stack of equal blocks is 'layer', or 'layer_from_N' if it starts at block
# N, and has a leading depth axis. A single block is 'layer_N'; ConvNeXt has 'stages_N'.
_BLOCK = re.compile(r"(?:encoder/)?(?:layer|stages)_?(?P<from>from_)?(?P<index>\d*)/(?P<name>.*)")


T = TypeVar("T")


class Output(Mapping[str, Any]):
    """A base of frozen dataclasses that are read like transformers' outputs: by attribute, key or index.

    As in transformers, a field that is None has no key and no index, and iteration yields keys. JAX treats
    an output as a pytree.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all fields that are not None, in order; an output among them becomes a tuple, too."""
        values = (self[key] for key in self)
        return tuple(x.to_tuple() if isinstance(x, Output) else x for x in values)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return tuple(self.values())[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in tuple(self)

    def __iter__(self) -> Iterator[str]:
        names = (field.name for field in dataclasses.fields(cast(Any, self)))
        return (name for name in names if getattr(self, name) is not None)

    def __len__(self) -> int:
        return len(tuple(iter(self)))


def _as_pytree(class_: type[T]) -> type[T]:
    """Register a dataclass with JAX, so that jit, grad and vmap take and return it."""
    names = [field.name for field in dataclasses.fields(cast(Any, class_))]

    def with_keys(output: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(output, name)) for name in names], None

    def unflatten(_: None, values: Iterable[Any]) -> Any:
        # Not by __init__, which may check types: JAX also builds trees with other leaves than arrays.
        output = object.__new__(class_)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(output, name, value)
        return output

    jax.tree_util.register_pytree_with_keys(class_, with_keys, unflatten)
    return class_


@_as_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ModelOutput(Output):
    """The output of a tower."""

    last_hidden_state: Float[Array, "B L D"]
    pooler_output: Float[Array, "B P"]
    # BxLxD: the input of the first block and the output of each block. A ConvNeXt has one for each stage,
    # with different L and D.
    hidden_states: tuple[Array, ...] | None = None
    # BxNxLxL: the attention probabilities of each block.
    attentions: tuple[Array, ...] | None = None


@_as_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class DualEncoderOutput(Output):
    """The output of a dual encoder; the embeddings have length 1."""

    loss: Float[Array, ""] | None
    logits_per_image: Float[Array, "B T"]
    logits_per_text: Float[Array, "T B"]
    text_embeds: Float[Array, "T E"]
    image_embeds: Float[Array, "B E"]
    text_model_output: ModelOutput
    vision_model_output: ModelOutput


def model_output(
    output: TowerOutput, recorded: Mapping[str, Any], *, hidden_states: bool, attentions: bool
) -> ModelOutput:
    """Return the output with the records of the tower's blocks; convolutions have no attentions."""
    if not recorded:
        return ModelOutput(*output)
    # `sow` stores each record in a tuple. The encoder may be a module of its own or the tower itself.
    (first,) = recorded.get("input") or recorded["encoder"]["input"]
    states = [first, *_block_records(recorded, "hidden_state")]
    probabilities = _block_records(recorded, "attention/probability")
    return ModelOutput(
        *output,
        hidden_states=tuple(map(_sequence, states)) if hidden_states else None,
        attentions=tuple(probabilities) if attentions and probabilities else None,
    )


def _block_records(recorded: Mapping[str, Any], name: str) -> list[Array]:
    """Return the records of all blocks under `name`, from the first block to the last."""
    found: list[tuple[int, list[Array]]] = []
    for path, (value,) in flatten(recorded).items():
        if (block := _BLOCK.fullmatch(path)) and block["name"] == name:
            # A stack's record has a leading depth axis, which is split into the blocks.
            is_stack = block["from"] or not block["index"]
            found.append((int(block["index"] or 0), list(value) if is_stack else [value]))
    return [value for _, values in sorted(found, key=lambda item: item[0]) for value in values]


def _sequence(state: Array) -> Float[Array, "B L D"]:
    """Return tokens as they are, and the positions of a feature map BxHxWxD row by row."""
    return state.reshape(len(state), -1, state.shape[-1])
