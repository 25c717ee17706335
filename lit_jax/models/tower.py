"""What the towers of all families share.

Dims: B batch, HxW pixels, C channels, Q tokens, L position embeddings, M of them at another size, D width,
P width of the output.
"""

import dataclasses
import re
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.config import Pooling, Remat
from lit_jax.models.patches import Matrix, bicubic_matrix, pair, patch_grid, resize_positions
from lit_jax.models.transformer import BlockConfig, Encoder, LastBlock
from lit_jax.trees import Tree, flatten, unflatten


class TowerOutput(NamedTuple):
    """What every tower returns: its tokens, and the one vector that stands for the input.

    The tokens are all there are, or the pooled one alone; see `Tower.all_tokens`.
    """

    last_hidden_state: Float[Array, "B Q D"]
    pooled: Float[Array, "B P"]


class Tower(nn.Module):
    """What the towers of all families have in common.

    Attributes:
        config: a frozen dataclass with the fields of config.json that change a number, and `model_type`.
        pooling: what stands for the input: 'pooler' is what the family itself calls the pooled output,
            'cls' the first token of the last hidden state, 'mean' the mean of its patches or attended
            tokens.
        dtype: of the computation.
        remat: what of a block the backward pass computes again; see lit_jax/config.py.
        all_tokens: whether the last hidden state is wanted. If not, a transformer that is pooled by one token
            computes its last block for that token alone: of a ViT-B/16 or a BERT-base, 7% less.
        cuts: names of blocks at which a new stack begins, such as 'encoder/layer_10'. What trains and what
            is locked cannot be in one array; see training/policy.py.
        poolings: those that the family has.
        fixed_length: whether a text tower sees the padding, since it has no mask, so that all texts must have
            as many tokens as those it was trained with.
    """

    config: Any
    pooling: Pooling = "pooler"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    all_tokens: bool = True
    cuts: tuple[str, ...] = ()

    poolings: ClassVar[tuple[Pooling, ...]] = ("pooler", "cls", "mean")
    fixed_length: ClassVar[bool] = False

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an input, to initialise with."""
        raise NotImplementedError

    @property
    def pools_one_token(self) -> bool:
        """Whether what is pooled is made of one token of the last hidden state alone."""
        return "cls" in self.poolings and self.pooling != "mean"

    @property
    def last_block(self) -> LastBlock:
        """How `Encoder` has it. It is apart whether all tokens are wanted or one: so both have the same tree
        of parameters, and no step copies the other blocks out of a stack of all.
        """
        if not self.pools_one_token:
            return "scanned"
        return "apart" if self.all_tokens else "one token"

    def encoder(self, block: BlockConfig, first: int = 0) -> Encoder:
        """Return the module `encoder` with this kind of block, counted from `first`."""
        cuts = cuts_under("encoder", self.cuts)
        return Encoder(block, self.dtype, self.remat, self.last_block, first, cuts, name="encoder")


def cuts_under(module_name: str, cuts: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of the blocks among `Tower.cuts` that are directly in the module of this name."""
    found = (re.fullmatch(rf"{module_name}/layer_(\d+)", cut) for cut in cuts)
    return tuple(int(match[1]) for match in found if match)


class ImageTower(Tower):
    """A tower whose config has `image_size` and `num_channels`."""

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        shape = (1, *pair(self.config.image_size), self.config.num_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def position_matrix(self) -> Matrix:
        """What position embeddings are interpolated by."""
        return bicubic_matrix

    def interpolated(self, params: Tree, image_size: int) -> tuple["ImageTower", Tree]:
        """A tower whose config has `image_size`, pixels of a square, and computes with its parameters what
        this one computes for such images with `params`.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        flat = flatten(params)
        flat = {path: self.at_size(path, leaf, image_size) for path, leaf in flat.items()}
        return self.clone(config=config), unflatten(flat)

    def at_size(self, path: str, value: Array | np.ndarray, image_size: int) -> Array | np.ndarray:
        """The parameter at `path` for images of `image_size`."""
        if not path.startswith("embeddings/position_embedding"):
            return value
        *leading, length, width = value.shape  # Hugging Face's ViT has a batch of one in front
        positions_LxD = jnp.reshape(jnp.asarray(value), (length, width))
        resized_MxD = resize_positions(positions_LxD, *self.grids(image_size), self.position_matrix)
        return resized_MxD.reshape(*leading, -1, width)

    def grids(self, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """That of the config and that of `image_size`."""
        own_grid, grid = (
            patch_grid(size, self.config.patch_size)
            for size in (self.config.image_size, image_size)
        )
        return own_grid, grid
