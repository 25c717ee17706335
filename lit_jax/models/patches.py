"""Images to patches, and position embeddings to the size of an image.

Dims: B batch, HxW pixels, C channels, YxX patches, L tokens, D width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.errors import UserError

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size as config.json has it."""
    return (size, size) if isinstance(size, int) else size


def patch_grid(image_size: Size, patch_size: Size) -> tuple[int, int]:
    """The patches, in rows and columns, that an image has; pixels beyond the last whole one are left out."""
    (height, width), (patch_height, patch_width) = pair(image_size), pair(patch_size)
    return height // patch_height, width // patch_width


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
        if channels != self.num_channels:
            raise UserError(
                f"The images have {channels} channels and the image tower's config.json says "
                f"num_channels {self.num_channels}; convert the images."
            )
        if not rows or not columns:
            raise UserError(
                f"Images of {height}x{width} pixels are smaller than one patch of the image tower, "
                f"{patch_height}x{patch_width}; set config.data.image_size higher."
            )
        whole = pixel_values_BxHxWxC[:, : rows * patch_height, : columns * patch_width]
        patches = whole.reshape(batch, rows, patch_height, columns, patch_width, channels)
        # As a matrix product its gradient is three times as fast on CPU as that of a convolution.
        return nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.init_std),
            name="projection",
        )(patches.swapaxes(2, 3))


def resize_positions(
    positions_LxD: Float[Array, "L D"], own_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "M D"]:
    """Position embeddings of a `grid` of patches, from those of `own_grid`; leading tokens stay.

    Bicubic, as Hugging Face's towers do it with interpolate_pos_encoding=True.
    """
    if grid == own_grid:
        return positions_LxD
    rows, columns = (bicubic_matrix(*sizes) for sizes in zip(own_grid, grid, strict=True))
    leading = len(positions_LxD) - own_grid[0] * own_grid[1]
    positions_LxD = positions_LxD.astype(jnp.float32)
    patches_YxXxD = jnp.einsum(
        "yh,xw,hwd->yxd",
        rows,
        columns,
        positions_LxD[leading:].reshape(*own_grid, -1),
        precision="highest",  # TPU's default, one pass in bfloat16, is too coarse to resample with
    )
    patches_NxD = patches_YxXxD.reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([positions_LxD[:leading], patches_NxD])


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
