"""The embeddings of images: patches to tokens, and position embeddings for images of any size.

Dims: B batch, HxW pixels, C channels, YxX patches, N tokens in front or patches, L tokens, M tokens of a
resized grid, D width.
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
from lit_jax.models.layers import Dense, Dropout, broadcast_float32

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size in config.json, where one number means a square."""
    return (size, size) if isinstance(size, int) else size


def patch_grid(image_size: Size, patch_size: Size) -> tuple[int, int]:
    """Return the number of rows and columns of whole patches; pixels beyond them are left out."""
    (height, width), (patch_height, patch_width) = pair(image_size), pair(patch_size)
    return height // patch_height, width // patch_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEmbeddingConfig:
    """The description of the embeddings that a vision transformer has in front of its blocks."""

    width: int
    image_size: Size
    patch_size: Size
    num_channels: int
    init_std: float
    dropout: float = 0.0
    # Trained tokens in front of the patches.
    tokens: tuple[str, ...] = ("cls_token",)
    # The number of register tokens, which follow `tokens` and have no positions (2309.16588).
    registers: int = 0
    positions: bool = True
    # True interpolates positions with antialiasing.
    antialias: bool = False
    # Tokens and positions start as zeros.
    zero_init: bool = False
    # The shape of the mask token, a parameter of pretraining that is not used here.
    mask_token: tuple[int, ...] | None = None

    @property
    def matrix(self) -> "Matrix":
        """The function that makes the matrices by which positions are interpolated."""
        return antialiased_bicubic_matrix if self.antialias else bicubic_matrix

    @property
    def leading(self) -> int:
        """The number of tokens in front of the patches."""
        return len(self.tokens) + self.registers


class ImageEmbeddings(nn.Module):
    """The tokens of an image: trained tokens, then the patches row by row, with positions."""

    config: ImageEmbeddingConfig
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
            return broadcast_float32(tokens_1xNxD, (batch, count, width), self.dtype)

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
            x_BxLxD = x_BxLxD + broadcast_float32(positions_LxD, x_BxLxD.shape, self.dtype)
        if cfg.registers:
            registers_BxNxD = trained("register_tokens", cfg.registers)
            parts = (x_BxLxD[:, : len(tokens)], registers_BxNxD, x_BxLxD[:, len(tokens) :])
            # Registers enter after the positions are added, because they have none.
            x_BxLxD = jnp.concatenate(parts, axis=1)
        if cfg.mask_token is not None:
            # No tower here uses the mask token, but Hugging Face's classes expect it in an exported file.
            self.param("mask_token", nn.initializers.zeros, cfg.mask_token)
        x_BxLxD = Dropout(cfg.dropout)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


def check_channels(pixel_values_BxHxWxC: Float[Array, "B H W C"], num_channels: int) -> None:
    """Raise UserError for images with another number of channels than the tower's."""
    _, *sizes, channels = pixel_values_BxHxWxC.shape
    if channels != num_channels:
        # In Python, the argument has the channels first, and other libraries have them last.
        is_last = num_channels in sizes
        remedy = "give [images, channels, height, width]" if is_last else "convert the images"
        raise UserError(
            f"The images have {channels} channels, but the image tower's config.json has "
            f"num_channels={num_channels}; {remedy}."
        )


class PatchEmbeddings(nn.Module):
    """A convolution whose stride is its kernel size."""

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
                f"{patch_height}x{patch_width}; make the images larger (config.data.image_size)."
            )
        whole = pixel_values_BxHxWxC[:, : rows * patch_height, : columns * patch_width]
        # The dense layer contracts (patch_height, patch_width, channels), the axes of a convolution's kernel
        # in the checkpoints.
        patches = whole.reshape(batch, rows, patch_height, columns, patch_width, channels)
        # On CPU the gradient of a matrix product is three times as fast as that of a convolution.
        init = nn.initializers.normal(self.init_std)
        return Dense(self.width, init, self.dtype, self.use_bias, axes=3, name="projection")(
            patches.swapaxes(2, 3)
        )


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Return the (new_size, size) matrix of torch's bicubic interpolation along one axis.

    Hugging Face's ViT uses torch.nn.functional.interpolate(mode='bicubic'): corners are not aligned, there
    is no antialiasing, and the border is repeated.
    """
    return _interpolation_matrix(size, new_size, functools.partial(_cubic, a=-0.75), reach=2)


@functools.cache
def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """Return the (new_size, size) matrix of torch's interpolation with mode='bilinear'."""
    return _interpolation_matrix(size, new_size, lambda d: np.maximum(1 - d, 0), reach=1)


@functools.cache
def antialiased_bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Return the (new_size, size) matrix of torch's interpolation with mode='bicubic' and antialias=True.

    With antialiasing torch uses another kernel (a = -0.5), as wide as a new pixel, drops the part beyond the
    border, and scales the weights of the rest to a sum of 1.
    """
    # The kernel widens only when the image shrinks; there is nothing to smooth when it grows.
    width = max(size / new_size, 1)
    source_Nx1 = (np.arange(new_size)[:, None] + 0.5) * (size / new_size) - 0.5
    matrix = _cubic(np.abs(np.arange(size)[None] - source_Nx1) / width, a=-0.5)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _interpolation_matrix(
    size: int, new_size: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
    """Return the matrix whose weights are the `kernel` of the distance to each old pixel, below `reach`."""
    # The centres of the new pixels, in coordinates of the old ones. Corners are not aligned.
    source = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    matrix = np.zeros((new_size, size))
    for tap in range(1 - reach, 1 + reach):
        index = np.floor(source) + tap
        column = np.clip(index, 0, size - 1).astype(int)
        # Repeated borders give one column several weights, which `+=` on an index array would not add up.
        np.add.at(matrix, (np.arange(new_size), column), kernel(np.abs(source - index)))
    return matrix.astype(np.float32)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' cubic convolution kernel (1981) at a distance of at least 0."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


# (size, new_size) -> a (new_size, size) matrix
Matrix = Callable[[int, int], np.ndarray]


def resize_positions(
    positions_LxD: Float[Array, "L D"],
    own_grid: tuple[int, int],
    grid: tuple[int, int],
    matrix: Matrix = bicubic_matrix,
) -> Float[Array, "M D"]:
    """Return the position embeddings for a `grid` of patches from those for `own_grid`; leading tokens stay.

    `matrix` interpolates along each axis, as Hugging Face's towers do with interpolate_pos_encoding=True.
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
    """Interpolate values to a `grid` of YxX, in float32."""
    rows, columns = (matrix(*sizes) for sizes in zip(values_HxWxD.shape[:2], grid, strict=True))
    return jnp.einsum(
        "yh,xw,hwd->yxd",
        rows,
        columns,
        values_HxWxD.astype(jnp.float32),
        # The default on TPU, one pass in bfloat16, is too coarse for an interpolation.
        precision="highest",
    )
