"""The Vision Transformer (https://arxiv.org/abs/2010.11929), numerically Hugging Face's ViTModel.

Dims: B batch, HxW pixels, C channels, YxX patches, L = 1 + Y * X tokens, D width,
F width of the MLP, P pooled width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import DenseAct, Encoder, LayerNorm, SelfAttention, TowerOutput, dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224  # pixels; a pair is (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"

    @property
    def image_shape(self) -> tuple[int, int]:
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        return _pair(self.patch_size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class ViT(nn.Module):
    """The image tower. `pooling`: 'pooler' is the trained head on the CLS token, 'cls' that token,
    'mean' the mean of the patch tokens, each after the final normalisation.
    """

    config: ViTConfig
    pooling: Pooling = "pooler"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated position embeddings.
        Not `deterministic`: dropout, with the rng 'dropout'.
        """
        cfg = self.config
        x_BxLxD = Embeddings(cfg, self.dtype, name="embeddings")(
            pixel_values_BxHxWxC, deterministic
        )
        make_layer = functools.partial(Layer, cfg, self.dtype)
        x_BxLxD = Encoder(make_layer, cfg.num_hidden_layers, name="encoder")(
            x_BxLxD, None, deterministic
        )
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)
        if self.pooling == "pooler":
            pooled_BxP = DenseAct(
                cfg.pooler_output_size or cfg.hidden_size,
                cfg.pooler_act,
                cfg.initializer_range,
                self.dtype,
                name="pooler",
            )(x_BxLxD[:, 0])
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            pooled_BxP = x_BxLxD[:, 1:].mean(1)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an input, to initialise with."""
        shape = (1, *self.config.image_shape, self.config.num_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


class Embeddings(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        cfg, init = self.config, nn.initializers.normal(self.config.initializer_range)
        patches_BxYxXxD = PatchEmbeddings(cfg, self.dtype, name="patch_embeddings")(
            pixel_values_BxHxWxC
        )
        batch, *grid, width = patches_BxYxXxD.shape
        own_grid = [
            size // patch for size, patch in zip(cfg.image_shape, cfg.patch_shape, strict=True)
        ]
        cls_1x1xD = self.param("cls_token", init, (1, 1, width))
        positions_1xLxD = self.param(
            "position_embeddings", init, (1, 1 + own_grid[0] * own_grid[1], width)
        )
        if grid != own_grid:
            positions_1xLxD = _resize_positions(positions_1xLxD, own_grid, grid)
        x_BxLxD = jnp.concatenate(
            [
                jnp.broadcast_to(cls_1x1xD.astype(self.dtype), (batch, 1, width)),
                patches_BxYxXxD.reshape(batch, -1, width),
            ],
            axis=1,
        )
        x_BxLxD = x_BxLxD + positions_1xLxD.astype(self.dtype)
        x_BxLxD = nn.Dropout(cfg.hidden_dropout_prob)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


class PatchEmbeddings(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values_BxHxWxC: Float[Array, "B H W C"]) -> Float[Array, "B Y X D"]:
        cfg, (patch_height, patch_width) = self.config, self.config.patch_shape
        batch, height, width, channels = pixel_values_BxHxWxC.shape
        if channels != cfg.num_channels:
            raise UserError(
                f"The images have {channels} channels and the image tower's config.json says "
                f"num_channels {cfg.num_channels}; convert the images."
            )
        rows, columns = height // patch_height, width // patch_width
        if not rows or not columns:
            raise UserError(
                f"Images of {height}x{width} pixels are smaller than one patch of the image tower, "
                f"{patch_height}x{patch_width}; set config.data.image_size higher."
            )
        # As in torch, pixels beyond the last whole patch are left out.
        whole = pixel_values_BxHxWxC[:, : rows * patch_height, : columns * patch_width]
        patches = whole.reshape(batch, rows, patch_height, columns, patch_width, channels)
        # A convolution in all but name; as a matrix product its gradient is three times as fast on CPU.
        return nn.DenseGeneral(
            cfg.hidden_size,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(cfg.initializer_range),
            name="projection",
        )(patches.swapaxes(2, 3))


class Layer(nn.Module):
    """One pre-norm transformer block."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        bias_Bx1xLxL: Float[Array, "B 1 #L L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        h_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm_before")(x_BxLxD)
        x_BxLxD += Attention(cfg, self.dtype, name="attention")(
            h_BxLxD, bias_Bx1xLxL, deterministic
        )
        h_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm_after")(x_BxLxD)
        h_BxLxF = DenseAct(
            cfg.intermediate_size,
            cfg.hidden_act,
            cfg.initializer_range,
            self.dtype,
            name="intermediate",
        )(h_BxLxD)
        return x_BxLxD + Output(cfg, self.dtype, name="output")(h_BxLxF, deterministic)


class Attention(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        bias_Bx1xLxL: Float[Array, "B 1 #L L"] | None,
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        context_BxLxD = SelfAttention(
            cfg.num_attention_heads,
            cfg.qkv_bias,
            cfg.attention_probs_dropout_prob,
            cfg.initializer_range,
            self.dtype,
            name="attention",
        )(x_BxLxD, bias_Bx1xLxL, deterministic)
        return Output(cfg, self.dtype, name="output")(context_BxLxD, deterministic)


class Output(nn.Module):
    """The end of either half of a block: back to the width of the model, dropout."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxLxF: Float[Array, "B L F"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        x_BxLxD = dense(
            cfg.hidden_size, name="dense", init_std=cfg.initializer_range, dtype=self.dtype
        )(x_BxLxF)
        return nn.Dropout(cfg.hidden_dropout_prob)(x_BxLxD, deterministic=deterministic)


def _resize_positions(
    positions_1xLxD: Float[Array, "1 L D"], own_grid: list[int], grid: list[int]
) -> Float[Array, "1 M D"]:
    """Position embeddings of the CLS token and a `grid` of patches, from those of `own_grid`."""
    rows, columns = map(bicubic_matrix, own_grid, grid)
    cls_1x1xD, patches_1xNxD = positions_1xLxD[:, :1], positions_1xLxD[:, 1:]
    patches_MxD = jnp.einsum(
        "yh,xw,hwd->yxd",
        rows,
        columns,
        patches_1xNxD.reshape(*own_grid, -1).astype(jnp.float32),
        precision="highest",  # TPU's default, one pass in bfloat16, is too coarse to resample with
    ).reshape(1, grid[0] * grid[1], -1)
    return jnp.concatenate([cls_1x1xD.astype(jnp.float32), patches_MxD], axis=1)


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """The (new_size, size) matrix of torch's bicubic interpolation along one axis.

    Keys' cubic convolution kernel with a = -0.75, corners not aligned, no antialiasing, the border
    repeated: torch.nn.functional.interpolate(mode='bicubic'), which Hugging Face's ViT uses.
    """
    a = -0.75
    source = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    matrix = np.zeros((new_size, size))
    for tap in (-1, 0, 1, 2):
        index = np.floor(source) + tap
        d = np.abs(source - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = np.where(d <= 1, near, far)
        column = np.clip(index, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(new_size), column), weight)
    return matrix.astype(np.float32)
