"""The sequence that the towers of all families share: tokens, blocks, one vector.

The file of a family has only what is particular to the family: a config, and the methods of
`ImageTransformer` or `TextTransformer` that differ.

Dims: B batch, HxW pixels, C channels, L tokens (Q as queries), M tokens of an image of another size, D width,
P width of the output.
"""

import dataclasses
import re
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lit_jax.config import Pooling, Remat
from lit_jax.models.attention import attention_bias
from lit_jax.models.layers import LayerNorm, mean_of_attended
from lit_jax.models.patches import (
    ImageEmbeddingConfig,
    ImageEmbeddings,
    Matrix,
    Size,
    bicubic_matrix,
    pair,
    patch_grid,
    resize_positions,
)
from lit_jax.models.token_embeddings import TokenEmbeddings, check_length, token_positions
from lit_jax.models.transformer import (
    Bias,
    BiasOfTable,
    BlockConfig,
    Encoder,
    LastBlock,
    Rotary,
    TokenSelector,
    first_token,
)
from lit_jax.trees import Tree, flatten, unflatten


class TowerOutput(NamedTuple):
    """The output of every tower: the tokens, and one vector that represents the input.

    `last_hidden_state` has all tokens or the pooled token alone; see `Tower.all_tokens`.
    """

    last_hidden_state: Float[Array, "B Q D"]
    pooled: Float[Array, "B P"]


class Tower(nn.Module):
    """A tower of any family.

    Attributes:
        config: a frozen dataclass with the fields of config.json that change a number, and `model_type`.
        pooling: the vector that represents the input. 'pooler' is the family's own pooled output, 'cls' the
            first token of the last hidden state, 'mean' the mean of the patches or the attended tokens.
        dtype: the dtype of the computation.
        remat: the parts of a block that the backward pass recomputes; see lit_jax/config.py.
        all_tokens: whether the caller needs the last hidden state. If not, a transformer that is pooled by
            one token computes its last block for that token alone: 7% less of a ViT-B/16 or a BERT-base.
        cuts: the names of blocks at which a new stack begins, such as 'encoder/layer_10'. Trainable and
            locked parameters cannot share an array; see training/policy.py.
        poolings: the poolings that the family has.
        fixed_length: whether a text tower without a mask sees the padding, so that all texts must have as
            many tokens as the texts of the tower's training.
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
        """The shape and dtype of an input, to initialise with."""
        raise NotImplementedError

    @property
    def pools_one_token(self) -> bool:
        """True if the pooled output depends on one token of the last hidden state alone."""
        return "cls" in self.poolings and self.pooling != "mean"

    @property
    def last_block(self) -> LastBlock:
        """The place of the last block in `Encoder`.

        A block that may be computed for one token lies outside the scan even when all tokens are needed. So
        both modes share one tree of parameters, and no step copies the other blocks out of a full stack.
        """
        if not self.pools_one_token:
            return "in scan"
        return "outside" if self.all_tokens else "one token"

    def encoder(self, block: BlockConfig, first: int = 0) -> Encoder:
        """Return the module `encoder` with blocks as `block` describes them, numbered from `first`."""
        cuts = cuts_under("encoder", self.cuts)
        return Encoder(block, self.dtype, self.remat, self.last_block, first, cuts, name="encoder")


def cuts_under(module_name: str, cuts: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of the blocks among `Tower.cuts` that lie directly in the module of this name."""
    found = (re.fullmatch(rf"{module_name}/layer_(\d+)", cut) for cut in cuts)
    return tuple(int(match[1]) for match in found if match)


class ImageTower(Tower):
    """A tower whose config has `image_size` and `num_channels`."""

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of one image of the config's size, float32."""
        shape = (1, *pair(self.config.image_size), self.config.num_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def position_matrix(self) -> Matrix:
        """The function that makes the matrices by which position embeddings are interpolated."""
        return bicubic_matrix

    def interpolated(self, params: Tree, image_size: int) -> tuple["ImageTower", Tree]:
        """Return the tower and the parameters for square images of `image_size` pixels.

        The returned tower gives the same outputs for such images as this tower gives with `params`.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        flat = flatten(params)
        flat = {path: self.at_size(path, leaf, image_size) for path, leaf in flat.items()}
        return self.clone(config=config), unflatten(flat)

    def at_size(self, path: str, value: Array | np.ndarray, image_size: int) -> Array | np.ndarray:
        """Return the parameter at `path` for images of `image_size`."""
        # The prefix covers ViT's `position_embeddings` and CLIP's `position_embedding/embedding`.
        if not path.startswith("embeddings/position_embedding"):
            return value
        # Hugging Face's ViT has a leading axis of length 1.
        *leading, length, width = value.shape
        positions_LxD = jnp.reshape(jnp.asarray(value), (length, width))
        resized_MxD = resize_positions(positions_LxD, *self.grids(image_size), self.position_matrix)
        return resized_MxD.reshape(*leading, -1, width)

    def grids(self, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the grid of patches of the config's image size, and the grid of `image_size`."""
        own_grid, grid = (
            patch_grid(size, self.config.patch_size)
            for size in (self.config.image_size, image_size)
        )
        return own_grid, grid


class ImageTransformer(ImageTower):
    """A vision transformer: embeddings, blocks, normalisation, pooling.

    The methods are those of ViT by default, and the pooler is the CLS token. `config.embeddings` and
    `config.block` describe the parts.
    """

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Encode pixels that the image processor has normalised.

        Images of another size than the config's are encoded with interpolated positions. Unless
        `deterministic`, there is dropout and drop path, with the rng 'dropout'. Raises UserError, when
        traced, for images smaller than a patch.
        """
        _, height, width, _ = pixel_values_BxHxWxC.shape
        grid = patch_grid((height, width), self.config.patch_size)
        x_BxLxD = self.embed(pixel_values_BxHxWxC, deterministic)
        # Bias and angles depend on the size of these images, which may differ from the config's.
        bias, rotary = self.attention_bias(grid), self.rotary(grid, deterministic)
        x_BxLxD = self.encoder(self.config.block)(x_BxLxD, bias, deterministic, rotary)
        # With `all_tokens` False the sequence may be the CLS token alone, which is the first one either way.
        x_BxLxD = self.final_norm(x_BxLxD)
        if self.pooling == "pooler":
            pooled_BxP = self.pooler(x_BxLxD)
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            # The mean leaves out CLS and register tokens.
            pooled_BxP = x_BxLxD[:, self.leading :].mean(1)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def leading(self) -> int:
        """The number of tokens in front of the patches."""
        return self.config.embeddings.leading

    @property
    def position_matrix(self) -> Matrix:
        return self.config.embeddings.matrix

    def embed(self, pixel_values_BxHxWxC: Array, deterministic: bool) -> Float[Array, "B L D"]:
        """Return the tokens that the first block gets."""
        embeddings = ImageEmbeddings(self.config.embeddings, self.dtype, name="embeddings")
        return embeddings(pixel_values_BxHxWxC, deterministic)

    def attention_bias(self, grid: tuple[int, int]) -> Bias | BiasOfTable | None:
        """Return the bias of the attention logits for a grid of patches, None without one; see `Encoder`."""
        return None

    def rotary(self, grid: tuple[int, int], deterministic: bool) -> Rotary | None:
        """Return the rotary positions of the tokens, None for a family without them."""
        return None

    def final_norm(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        """Return the last hidden state from the tokens of the last block."""
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)

    def pooler(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B P"]:
        """Return the output of the pooling 'pooler' from the last hidden state."""
        return x_BxLxD[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFields:
    """The fields of config.json that describe the blocks of ViT, BERT and the families close to them.

    Names and defaults are Hugging Face's, here and in the configs that derive from this class.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    norm_first: ClassVar[bool] = True

    @property
    def mlp_width(self) -> int:
        """The width inside the MLP of a block."""
        raise NotImplementedError

    @property
    def block(self) -> BlockConfig:
        """The description of the blocks."""
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.mlp_width,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=self.norm_first,
            init_std=self.initializer_range,
            attention_dropout=self.attention_probs_dropout_prob,
            output_dropout=self.hidden_dropout_prob,
            mlp_dropout=self.hidden_dropout_prob,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTFields(BlockFields):
    """The fields of config.json that change a number and that ViT, BEiT and DINOv2 share."""

    # Pixels; a pair is (height, width).
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        """The description of the image embeddings."""
        return ImageEmbeddingConfig(
            width=self.hidden_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            init_std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
        )


class TextTransformer(Tower):
    """A text transformer: embeddings, blocks, pooling.

    By default the tokens of the last block are the last hidden state, and the first token is the pooled
    output. `config.embedding` and `config.block` describe the embeddings and the blocks.
    """

    # True means that a token attends to itself and to earlier tokens only.
    is_causal: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self,
        input_ids_BxL: Int[Array, "B L"],
        attention_mask_BxL: Int[Array, "B L"] | None = None,
        token_type_ids_BxL: Int[Array, "B L"] | None = None,
        position_ids_BxL: Int[Array, "B L"] | None = None,
        *,
        deterministic: bool = True,
    ) -> TowerOutput:
        """Encode token ids.

        By default all tokens are attended, all token types are 0, and the config decides the positions. A
        family without token types ignores them. Unless `deterministic`, there is dropout, with the rng
        'dropout'. Raises UserError, when traced, for a text that is too long.
        """
        if attention_mask_BxL is None:
            attention_mask_BxL = jnp.ones_like(input_ids_BxL)
        attended_BxL = attention_mask_BxL > 0
        embedding = self.config.embedding
        if position_ids_BxL is None:
            # A look-up beyond the table of positions would give NaN instead of an error.
            check_length(input_ids_BxL.shape[1], embedding.max_length)
            position_ids_BxL = token_positions(input_ids_BxL, embedding.padding_id)
        # A mean over all tokens needs no selector; `Encoder` then ignores the argument.
        select = self.token_selector(input_ids_BxL) if self.pools_one_token else first_token
        x_BxLxD = TokenEmbeddings(embedding, self.dtype, name="embeddings")(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, deterministic
        )
        x_BxLxD = self.encode(x_BxLxD, attended_BxL, position_ids_BxL, select, deterministic)
        x_BxLxD = self.final_norm(x_BxLxD)
        if not self.pools_one_token:
            return TowerOutput(x_BxLxD, mean_of_attended(x_BxLxD, attended_BxL))
        # A last block that was computed for one token has already selected that token.
        token_BxD = (select(x_BxLxD, 1) if self.all_tokens else x_BxLxD)[:, 0]
        return TowerOutput(
            x_BxLxD, self.pooler(token_BxD) if self.pooling == "pooler" else token_BxD
        )

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of one text of one token, int32."""
        # No parameter depends on the length of a text.
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)

    @property
    def pools_one_token(self) -> bool:
        # Every other pooling takes a token, whichever one the family's selector finds.
        return self.pooling != "mean"

    def token_selector(self, input_ids_BxL: Int[Array, "B L"]) -> TokenSelector:
        """Return the function that selects the pooled token of each text."""
        return first_token

    def encode(
        self,
        x_BxLxD: Float[Array, "B L D"],
        attended_BxL: Bool[Array, "B L"],
        position_ids_BxL: Int[Array, "#B L"],
        select: TokenSelector,
        deterministic: bool,
    ) -> Float[Array, "B Q D"]:
        """Return the tokens of the last block."""
        bias = self.attention_bias(attended_BxL)
        encoder = self.encoder(self.config.block)
        return encoder(x_BxLxD, bias, deterministic, select=select)

    def attention_bias(self, attended_BxL: Bool[Array, "B L"]) -> Bias:
        """Return the bias of the attention logits, which masks padding and, if causal, later tokens."""
        return attention_bias(attended_BxL, causal=self.is_causal)

    def final_norm(self, x_BxLxD: Float[Array, "B Q D"]) -> Array:
        """Return the last hidden state from the tokens of the last block."""
        return x_BxLxD

    def pooler(self, token_BxD: Float[Array, "B D"]) -> Float[Array, "B P"]:
        """Return the output of the pooling 'pooler' from the selected token."""
        return token_BxD
