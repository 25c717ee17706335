"""BEiT (https://arxiv.org/abs/2106.08254), numerically Hugging Face's BeitModel.

Dims: B batch, L = 1 + Y * X tokens with YxX patches, D width, H heads, N tables of attention biases,
R = (2Y - 1)(2X - 1) + 3 rows of a table, S rows of a resized table.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.models.layers import LayerNorm
from lit_jax.models.patches import ImageEmbeddingConfig, bilinear_matrix, patch_grid, resize_grid
from lit_jax.models.tower import ImageTransformer, ViTFields
from lit_jax.models.transformer import Bias, BiasOfTable, BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeitConfig(ViTFields):
    """The fields of BEiT's config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "beit"
    intermediate_size: int = 3072
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    # Each block has a table of its own.
    use_relative_position_bias: bool = False
    # One table for all blocks.
    use_shared_relative_position_bias: bool = False
    # 0 means no layer scale.
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True

    @property
    def bias_rows(self) -> int:
        """The number of rows of a table of attention biases: one for each offset, and three for CLS."""
        rows, columns = patch_grid(self.image_size, self.patch_size)
        return (2 * rows - 1) * (2 * columns - 1) + 3

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        return dataclasses.replace(
            super().embeddings,
            positions=self.use_absolute_position_embeddings,
            zero_init=True,
            mask_token=(1, 1, self.hidden_size) if self.use_mask_token else None,
        )

    @property
    def block(self) -> BlockConfig:
        return dataclasses.replace(
            super().block,
            # A bias of the keys adds the same number to all logits of a query, which softmax ignores.
            without_bias=("key",),
            bias_rows=self.bias_rows if self.use_relative_position_bias else 0,
            layer_scale=self.layer_scale_init_value if self.layer_scale_init_value > 0 else None,
            drop_path=self.drop_path_rate,
        )


class Beit(ImageTransformer):
    """The image tower.

    With `use_mean_pooling` the tokens are not normalised after the last block, and the pooler normalises
    the mean of the patches. Without it the tower is pooled like ViT: all tokens are normalised, and the
    pooled output is the first token.
    """

    config: BeitConfig

    def final_norm(self, x_BxLxD: Float[Array, "B L D"]) -> Array:
        return x_BxLxD if self.config.use_mean_pooling else super().final_norm(x_BxLxD)

    def pooler(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        if not self.config.use_mean_pooling:
            return super().pooler(x_BxLxD)
        return MeanPooler(self.config.layer_norm_eps, self.dtype, name="pooler")(x_BxLxD)

    @property
    def pools_one_token(self) -> bool:
        is_mean = self.pooling == "pooler" and self.config.use_mean_pooling
        return super().pools_one_token and not is_mean

    def at_size(self, path: str, value: Array | np.ndarray, image_size: int) -> Array | np.ndarray:
        """Return the parameter at `path` for images of `image_size`."""
        if not path.endswith("position_bias_table"):
            return super().at_size(path, value, image_size)
        own_grid, grid = self.grids(image_size)
        # A shared table has no leading axis. The tables of a scanned stack have a depth axis.
        *leading, rows, heads = value.shape
        tables_NxRxH = jnp.reshape(jnp.asarray(value), (-1, rows, heads))
        resized = [resize_table(table_RxH, own_grid, grid) for table_RxH in tables_NxRxH]
        # A table for another size has another number of rows.
        return jnp.stack(resized).reshape(*leading, -1, heads)

    def attention_bias(self, grid: tuple[int, int]) -> Bias | BiasOfTable | None:
        cfg = self.config
        own_grid = patch_grid(cfg.image_size, cfg.patch_size)
        of_table = functools.partial(position_bias, own_grid=own_grid, grid=grid)
        shared = None
        if cfg.use_shared_relative_position_bias:
            shape = (cfg.bias_rows, cfg.num_attention_heads)
            shared = of_table(self.param("position_bias_table", nn.initializers.zeros, shape))
        if not cfg.use_relative_position_bias:
            return shared
        # A config may ask for both kinds of tables; transformers adds their biases.
        return of_table if shared is None else lambda table_RxH: of_table(table_RxH) + shared


class MeanPooler(nn.Module):
    """A pooler that normalises the mean of the patches; the CLS token does not count."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        return LayerNorm(self.epsilon, self.dtype, name="layernorm")(x_BxLxD[:, 1:].mean(1))


def position_bias(
    table_RxH: Float[Array, "R H"], own_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "1 H L L"]:
    """Return the attention bias of each pair of tokens in a `grid` of patches; the table has `own_grid`."""
    table_RxH = resize_table(table_RxH, own_grid, grid)
    return table_RxH[_rows_of_pairs(*grid)].transpose(2, 0, 1)[None]


def resize_table(
    table_RxH: Float[Array, "R H"], own_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "S H"]:
    """Return a table of attention biases for a `grid` of patches, float32, from a table for `own_grid`.

    The table has a row for each offset between two patches, and three more rows: CLS to patch, patch to CLS,
    CLS to CLS. The rows of offsets are interpolated if the grids differ; the last three rows stay.
    """
    table_RxH = table_RxH.astype(jnp.float32)
    rows, columns = own_grid
    # transformers resizes the table in this shape, although its entries are in the order (rows, columns).
    # Another shape would give other numbers than transformers for a grid that is not square.
    offsets_HxWxH = table_RxH[:-3].reshape(2 * columns - 1, 2 * rows - 1, -1)
    wanted = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if offsets_HxWxH.shape[:2] != wanted:
        offsets_HxWxH = resize_grid(offsets_HxWxH, wanted, bilinear_matrix)
    heads = table_RxH.shape[1]
    return jnp.concatenate([offsets_HxWxH.reshape(-1, heads), table_RxH[-3:]])


@functools.cache
def _rows_of_pairs(rows: int, columns: int) -> np.ndarray:
    """Return the row of the table for each pair of a query and a key, int (L, L)."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    # An offset lies in -(rows - 1) .. rows - 1; the added term makes it an index from 0.
    down = row[:, None] - row[None] + rows - 1
    right = column[:, None] - column[None] + columns - 1
    # Token 0 is CLS: its row is CLS to patch, its column patch to CLS, and the corner CLS to CLS.
    index_LxL = np.pad(down * (2 * columns - 1) + right, ((1, 0), (1, 0)))
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index_LxL[0], index_LxL[1:, 0], index_LxL[0, 0] = offsets, offsets + 1, offsets + 2
    return index_LxL
