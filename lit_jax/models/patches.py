"""Images to tokens, and position embeddings to the size of an image.

Dims: B batch, HxW pixels, C channels, YxX patches, L tokens, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import Dense, Dropout, to_rows

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size as config.json has it."""
    return (size, size) if isinstance(size, int) else size


def patch_grid(image_size: Size, patch_size: Size) -> tuple[int, int]:
    """The patches, in rows and columns, that an image has; pixels beyond the last whole one are left out."""
    (height, width), (patch_height, patch_width) = pair(image_size), pair(patch_size)
    return height // patch_height, width // patch_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """What is in front of the blocks of a vision transformer."""

    width: int
    image_size: Size
    patch_size: Size
    num_channels: int
    init_std: float
    dropout: float = 0.0
    tokens: tuple[str, ...] = ("cls_token",)  # trained, in front of the patches
    registers: int = 0  # further ones behind those, without positions (2309.16588)
    positions: bool = True
    antialias: bool = False  # when positions are interpolated
    zero_init: bool = False  # of tokens and positions
    mask_token: tuple[int, ...] | None = None  # shape of a parameter of pretraining, not used here

    @property
    def matrix(self) -> "Matrix":
        """What positions are interpolated by."""
        return antialiased_bicubic_matrix if self.antialias else bicubic_matrix

    @property
    def leading(self) -> int:
        """The tokens in front of the patches."""
        return len(self.tokens) + self.registers


class Embeddings(nn.Module):
    """The tokens of an image: trained ones, then its patches, row by row, with positions."""

    config: EmbeddingsConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        init = nn.initializers.zeros if cfg.zero_init else nn.initializers.normal(cfg.init_std)
        patches_BxYxXxD = PatchEmbeddings(
            cfg.width,
            cfg.patch_size,
            cfg.num_channels,
            cfg.init_std,
            self.dtype,
            name="patch_embeddings",
        )(pixel_values_BxHxWxC)
        batch, rows, columns, width = patches_BxYxXxD.shape

        def trained(name: str, count: int) -> Array:
            tokens_1xNxD = self.param(name, init, (1, count, width))
            return to_rows(tokens_1xNxD, (batch, count, width), self.dtype)

        tokens = [trained(name, 1) for name in cfg.tokens]
        x_BxLxD = jnp.concatenate([*tokens, patches_BxYxXxD.reshape(batch, -1, width)], axis=1)
        if cfg.positions:
            own_grid = patch_grid(cfg.image_size, cfg.patch_size)
            length = len(tokens) + own_grid[0] * own_grid[1]
            positions_1xLxD = self.param("position_embeddings", init, (1, length, width))
            positions_LxD = resize_positions(
                jnp.squeeze(positions_1xLxD, 0),
                own_grid,
                (rows, columns),
                cfg.matrix,
            )
            x_BxLxD = x_BxLxD + to_rows(positions_LxD, x_BxLxD.shape, self.dtype)
        if cfg.registers:
            registers_BxNxD = trained("register_tokens", cfg.registers)
            parts = (x_BxLxD[:, : len(tokens)], registers_BxNxD, x_BxLxD[:, len(tokens) :])
            x_BxLxD = jnp.concatenate(parts, axis=1)
        if cfg.mask_token is not None:
            # Only so that the files we write have it, as Hugging Face's classes want.
            self.param("mask_token", nn.initializers.zeros, cfg.mask_token)
        x_BxLxD = Dropout(cfg.dropout)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


def check_channels(pixel_values_BxHxWxC: Float[Array, "B H W C"], num_channels: int) -> None:
    channels = pixel_values_BxHxWxC.shape[-1]
    if channels != num_channels:
        raise UserError(
            f"The images have {channels} channels and the image tower's config.json says "
            f"num_channels {num_channels}; convert the images."
        )


class PatchEmbeddings(nn.Module):
    """A convolution whose stride is its size."""

    width: int
    patch_size: Size
    num_channels: int
    init_std: float
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, pixel_values_BxHxWxC: Float[Array, "B H W C"]) -> Float[Array, "B Y X D"]:
        batch, height, width, channels = pixel_values_BxHxWxC.shape
        patch_height, patch_width = pair(self.patch_size)
        rows, columns = patch_grid((height, width), self.patch_size)
        check_channels(pixel_values_BxHxWxC, self.num_channels)
        if not rows or not columns:
            raise UserError(
                f"Images of {height}x{width} pixels are smaller than one patch of the image tower, "
                f"{patch_height}x{patch_width}; make them larger (config.data.image_size)."
            )
        whole = pixel_values_BxHxWxC[:, : rows * patch_height, : columns * patch_width]
        patches = whole.reshape(batch, rows, patch_height, columns, patch_width, channels)
        # As a matrix product its gradient is three times as fast on CPU as that of a convolution.
        init = nn.initializers.normal(self.init_std)
        return Dense(self.width, init, self.dtype, self.use_bias, axes=3, name="projection")(
            patches.swapaxes(2, 3)
        )


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """The (new_size, size) matrix of torch's bicubic interpolation along one axis.

    torch.nn.functional.interpolate(mode='bicubic'), which Hugging Face's ViT uses: corners not aligned,
    no antialiasing, the border repeated.
    """
    return _interpolation_matrix(size, new_size, functools.partial(_cubic, a=-0.75), reach=2)


@functools.cache
def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """The same with mode='bilinear'."""
    return _interpolation_matrix(size, new_size, lambda d: np.maximum(1 - d, 0), reach=1)


@functools.cache
def antialiased_bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """The same with mode='bicubic' and antialias=True.

    The kernel, another than without, gets as wide as a new pixel; what falls beyond the border is left out.
    """
    width = max(size / new_size, 1)
    source_Nx1 = (np.arange(new_size)[:, None] + 0.5) * (size / new_size) - 0.5
    matrix = _cubic(np.abs(np.arange(size)[None] - source_Nx1) / width, a=-0.5)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _interpolation_matrix(
    size: int, new_size: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
    """The weight of each old pixel is the `kernel` of its distance, 0 from `reach` on."""
    source = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    matrix = np.zeros((new_size, size))
    for tap in range(1 - reach, 1 + reach):
        index = np.floor(source) + tap
        column = np.clip(index, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(new_size), column), kernel(np.abs(source - index)))
    return matrix.astype(np.float32)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel of a distance."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


Matrix = Callable[[int, int], np.ndarray]  # (size, new_size) -> a (new_size, size) matrix


def resize_positions(
    positions_LxD: Float[Array, "L D"],
    own_grid: tuple[int, int],
    grid: tuple[int, int],
    matrix: Matrix = bicubic_matrix,
) -> Float[Array, "M D"]:
    """Position embeddings of a `grid` of patches, from those of `own_grid`; leading tokens stay.

    Interpolated along either axis by `matrix`, as Hugging Face's towers do it with
    interpolate_pos_encoding=True.
    """
    if grid == own_grid:
        return positions_LxD
    leading = len(positions_LxD) - own_grid[0] * own_grid[1]
    positions_LxD = positions_LxD.astype(jnp.float32)
    patches_YxXxD = resize_grid(positions_LxD[leading:].reshape(*own_grid, -1), grid, matrix)
    patches_NxD = patches_YxXxD.reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([positions_LxD[:leading], patches_NxD])


def resize_grid(
    values_HxWxD: Float[Array, "H W D"], grid: tuple[int, int], matrix: Matrix
) -> Float[Array, "Y X D"]:
    """Interpolates to a `grid` of YxX, in float32."""
    rows, columns = (matrix(*sizes) for sizes in zip(values_HxWxD.shape[:2], grid, strict=True))
    return jnp.einsum(
        "yh,xw,hwd->yxd",
        rows,
        columns,
        values_HxWxD.astype(jnp.float32),
        precision="highest",  # TPU's default, one pass in bfloat16, is too coarse to resample with
    )
