"""What a tower computes, as the Python interface gives it: with what its blocks recorded on the way.

Dims: B inputs, L tokens, N heads, D width, P pooled width.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from lit_jax.models.layers import TowerOutput
from lit_jax.trees import flatten

# Where a block records something: all equal ones are 'layer', those from the Nth on 'layer_from_N', each of
# these with a leading depth axis; a single one is 'layer_N', and ConvNeXt has 'stages_N'.
_BLOCK = re.compile(r"(?:encoder/)?(?:layer|stages)_?(?P<from>from_)?(?P<index>\d*)/(?P<name>.*)")


class ModelOutput(NamedTuple):
    """What a tower computes."""

    last_hidden_state: Float[Array, "B L D"]
    pooler_output: Float[Array, "B P"]
    # Input of the blocks, output of each; of a ConvNeXt, of each stage.
    hidden_states: tuple[Float[Array, "B L D"], ...] | None
    attentions: tuple[Float[Array, "B N L L"], ...] | None  # probabilities of each block


def model_output(
    output: TowerOutput, recorded: Mapping[str, Any], *, hidden_states: bool, attentions: bool
) -> ModelOutput:
    """With what the blocks of the tower recorded; those that are convolutions have no attentions."""
    if not recorded:
        return ModelOutput(*output, None, None)
    (first,) = recorded.get("input") or recorded["encoder"]["input"]
    states = [first, *_of_blocks(recorded, "hidden_state")]
    probabilities = _of_blocks(recorded, "attention/probability")
    return ModelOutput(
        *output,
        hidden_states=tuple(map(_sequence, states)) if hidden_states else None,
        attentions=tuple(probabilities) if attentions and probabilities else None,
    )


def _of_blocks(recorded: Mapping[str, Any], name: str) -> list[Array]:
    """What every block recorded under `name`, from the first block to the last."""
    found: list[tuple[int, list[Array]]] = []
    for path, (value,) in flatten(recorded).items():
        if (block := _BLOCK.fullmatch(path)) and block["name"] == name:
            is_stack = block["from"] or not block["index"]
            found.append((int(block["index"] or 0), list(value) if is_stack else [value]))
    return [value for _, values in sorted(found, key=lambda item: item[0]) for value in values]


def _sequence(state: Array) -> Float[Array, "B L D"]:
    """Tokens as they are, the positions of a map row by row."""
    return state.reshape(len(state), -1, state.shape[-1])
