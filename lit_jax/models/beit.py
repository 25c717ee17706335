"""BEiT (https://arxiv.org/abs/2106.08254), numerically Hugging Face's BeitModel.

Dims: B batch, HxW pixels, C channels, L = 1 + Y * X tokens with YxX patches, D width, H heads,
R = (2Y - 1)(2X - 1) + 3 rows of a table of attention biases.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.models.layers import LayerNorm
from lit_jax.models.patches import (
    Embeddings,
    EmbeddingsConfig,
    Size,
    bilinear_matrix,
    patch_grid,
    resize_grid,
)
from lit_jax.models.tower import ImageTower, TowerOutput
from lit_jax.models.transformer import Bias, BiasOfTable, BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeitConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "beit"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: Size = 224  # pixels; a pair is (height, width)
    patch_size: Size = 16
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False  # each block with a table of its own
    use_shared_relative_position_bias: bool = False  # one table for all blocks
    layer_scale_init_value: float = 0.1  # 0: none
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True

    @property
    def bias_rows(self) -> int:
        rows, columns = patch_grid(self.image_size, self.patch_size)
        return (2 * rows - 1) * (2 * columns - 1) + 3

    @property
    def embeddings(self) -> EmbeddingsConfig:
        return EmbeddingsConfig(
            width=self.hidden_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            init_std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
            positions=self.use_absolute_position_embeddings,
            zero_init=True,
            mask_token=(1, 1, self.hidden_size) if self.use_mask_token else None,
        )

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            without_bias=("key",),
            bias_rows=self.bias_rows if self.use_relative_position_bias else 0,
            attention_dropout=self.attention_probs_dropout_prob,
            output_dropout=self.hidden_dropout_prob,
            mlp_dropout=self.hidden_dropout_prob,
            layer_scale=self.layer_scale_init_value if self.layer_scale_init_value > 0 else None,
            drop_path=self.drop_path_rate,
        )


class Beit(ImageTower):
    """The image tower.

    With `use_mean_pooling` its tokens are not normalised after the last block, and its pooler normalises
    the mean of its patches. Without, it is as in ViT: the tokens are normalised, and the pooled output
    is the first of them.
    """

    config: BeitConfig

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated positions. Not
        `deterministic`: dropout and drop path, with the rng 'dropout'.
        """
        cfg = self.config
        x_BxLxD = Embeddings(cfg.embeddings, self.dtype, name="embeddings")(
            pixel_values_BxHxWxC, deterministic
        )
        _, height, width, _ = pixel_values_BxHxWxC.shape
        bias = self._bias(patch_grid((height, width), cfg.patch_size))
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, bias, deterministic)
        if not cfg.use_mean_pooling:
            x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)
        if self.pooling == "pooler" and cfg.use_mean_pooling:
            pooled_BxD = MeanPooler(cfg.layer_norm_eps, self.dtype, name="pooler")(x_BxLxD)
        elif self.pooling == "mean":
            pooled_BxD = x_BxLxD[:, 1:].mean(1)
        else:
            pooled_BxD = x_BxLxD[:, 0]
        return TowerOutput(x_BxLxD, pooled_BxD)

    @property
    def pools_one_token(self) -> bool:
        """Whether what is pooled is made of one token of the last hidden state alone."""
        is_mean = self.pooling == "pooler" and self.config.use_mean_pooling
        return super().pools_one_token and not is_mean

    def at_size(self, path: str, value: Array | np.ndarray, image_size: int) -> Array | np.ndarray:
        """The parameter at `path` for images of `image_size`."""
        if not path.endswith("position_bias_table"):
            return super().at_size(path, value, image_size)
        own_grid, grid = self.grids(image_size)
        *leading, rows, heads = value.shape  # one table, or one a layer
        tables_NxRxH = jnp.reshape(jnp.asarray(value), (-1, rows, heads))
        resized = [resize_table(table_RxH, own_grid, grid) for table_RxH in tables_NxRxH]
        return jnp.stack(resized).reshape(*leading, -1, heads)

    def _bias(self, grid: tuple[int, int]) -> Bias | BiasOfTable | None:
        """What `Encoder` takes as the bias of the attention logits."""
        cfg = self.config
        own_grid = patch_grid(cfg.image_size, cfg.patch_size)
        of_table = functools.partial(position_bias, own_grid=own_grid, grid=grid)
        shared = None
        if cfg.use_shared_relative_position_bias:
            shape = (cfg.bias_rows, cfg.num_attention_heads)
            shared = of_table(self.param("position_bias_table", nn.initializers.zeros, shape))
        if not cfg.use_relative_position_bias:
            return shared
        return of_table if shared is None else lambda table_RxH: of_table(table_RxH) + shared


class MeanPooler(nn.Module):
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        mean_Bx1xD = x_BxLxD[:, 1:].mean(1, keepdims=True)
        return LayerNorm(self.epsilon, self.dtype, name="layernorm")(mean_Bx1xD)[:, 0]


def position_bias(
    table_RxH: Float[Array, "R H"], own_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "1 H L L"]:
    """The bias of each pair of tokens of a `grid` of patches, from a table for `own_grid`."""
    table_RxH = resize_table(table_RxH, own_grid, grid)
    return table_RxH[_rows_of_pairs(*grid)].transpose(2, 0, 1)[None]


def resize_table(
    table_RxH: Float[Array, "R H"], own_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "S H"]:
    """A table of attention biases for a `grid` of patches, from one for `own_grid`.

    The table has a row for each offset of one patch from another, interpolated if the grids differ, and
    three more: from CLS to a patch, from a patch to CLS, from CLS to itself.
    """
    table_RxH = table_RxH.astype(jnp.float32)
    rows, columns = own_grid
    # transformers resizes it in this shape, although (rows, columns) is the order of its entries. So
    # we do, or our numbers for a grid that is not square would be others.
    offsets_HxWxH = table_RxH[:-3].reshape(2 * columns - 1, 2 * rows - 1, -1)
    wanted = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if offsets_HxWxH.shape[:2] != wanted:
        offsets_HxWxH = resize_grid(offsets_HxWxH, wanted, bilinear_matrix)
    heads = table_RxH.shape[1]
    return jnp.concatenate([offsets_HxWxH.reshape(-1, heads), table_RxH[-3:]])


@functools.cache
def _rows_of_pairs(rows: int, columns: int) -> np.ndarray:
    """The row of the table for each pair of a query and a key, (L, L)."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down = row[:, None] - row[None] + rows - 1
    right = column[:, None] - column[None] + columns - 1
    index_LxL = np.pad(down * (2 * columns - 1) + right, ((1, 0), (1, 0)))
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index_LxL[0], index_LxL[1:, 0], index_LxL[0, 0] = offsets, offsets + 1, offsets + 2
    return index_LxL
