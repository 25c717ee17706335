"""A part of an enlarged image, computed without the rest of it; equal to Pillow's `resize` to the last bit.

Pillow can resize a box of an image, but it rounds the box to float32, so the result is up to 21 grey levels
away from the same part of the whole.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

# The bits of the fraction of a weight: libImaging/Resample.c.
_PRECISION_BITS = 22
# NumPy's own sine differs from the C library's, which Pillow calls, in the last bit.
_sin, _cos = np.vectorize(math.sin, [float]), np.vectorize(math.cos, [float])


class _Filter(NamedTuple):
    # The reach, in pixels.
    support: float
    # The weights at distances from the centre.
    weight: Callable[[np.ndarray], np.ndarray]


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _sinc(x: np.ndarray) -> np.ndarray:
    turned = np.where(x == 0, 1.0, x * np.pi)
    return np.where(x == 0, 1.0, _sin(turned) / turned)


def _hamming(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, _sinc(x) * (0.54 + 0.46 * _cos(x * np.pi)), 0.0)


FILTERS = {
    Image.Resampling.BOX: _Filter(0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    Image.Resampling.BILINEAR: _Filter(1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0)),
    Image.Resampling.HAMMING: _Filter(1.0, _hamming),
    Image.Resampling.BICUBIC: _Filter(2.0, _bicubic),
    Image.Resampling.LANCZOS: _Filter(
        3.0, lambda x: np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)
    ),
}


def enlarge_window(
    image: Image.Image,
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    resample: int,
) -> Image.Image:
    """Return `image.resize(size, resample).crop(window)` of an RGB image.

    Args:
        size: (width, height) of the whole, larger than the image in both directions. If one shrinks, the
            order of Pillow's two passes depends on its version.
        window: (left, top, right, bottom); black where it lies outside.
        resample: one of `FILTERS`.
    """
    kind = FILTERS[Image.Resampling(resample)]
    left, top, right, bottom = window
    result_HxWx3 = np.zeros((bottom - top, right - left, 3), np.uint8)
    columns = range(max(left, 0), min(right, size[0]))
    rows = range(max(top, 0), min(bottom, size[1]))
    if columns and rows:
        x_NxK, weight_NxK = _weights(image.width, size[0], columns, kind)
        y_MxL, weight_MxL = _weights(image.height, size[1], rows, kind)
        x, y = int(x_NxK.min()), int(y_MxL.min())
        source = image.crop((x, y, int(x_NxK.max()) + 1, int(y_MxL.max()) + 1))
        # First along rows, then along columns, with bytes in between, as Pillow does it.
        pixels = np.asarray(source, np.int64)
        pixels = _rounded(np.einsum("hnkc,nk->hnc", pixels[:, x_NxK - x], weight_NxK))
        pixels = _rounded(np.einsum("mlnc,ml->mnc", pixels[y_MxL - y], weight_MxL))
        inside = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        result_HxWx3[inside] = pixels
    return Image.fromarray(result_HxWx3)


def _weights(
    length: int, target: int, wanted: range, kind: _Filter
) -> tuple[Int[np.ndarray, "N K"], Int[np.ndarray, "N K"]]:
    """Return the pixels of `length` that make each `wanted` one of `target`, and their weights.

    Weights are whole numbers of 2^-22. If fewer than K pixels take part, the others weigh 0.
    """
    # Pillow's box is float32.
    scale = float(np.float32(length)) / target
    centre_Nx1 = ((np.arange(wanted.start, wanted.stop) + 0.5) * scale)[:, None]
    first_Nx1 = np.maximum((centre_Nx1 - kind.support + 0.5).astype(np.int64), 0)
    stop_Nx1 = np.minimum((centre_Nx1 + kind.support + 0.5).astype(np.int64), length)
    at_NxK = first_Nx1 + np.arange(int((stop_Nx1 - first_Nx1).max()))
    weight_NxK = kind.weight(at_NxK - centre_Nx1 + 0.5)
    weight_NxK = np.where(at_NxK < stop_Nx1, weight_NxK, 0.0)
    # One after the other: another order would round differently.
    sum_Nx1 = np.cumsum(weight_NxK, axis=1)[:, -1:]
    weight_NxK = weight_NxK / np.where(sum_Nx1 == 0, 1.0, sum_Nx1)
    fixed_NxK = np.trunc(weight_NxK * (1 << _PRECISION_BITS) + np.copysign(0.5, weight_NxK))
    return np.minimum(at_NxK, length - 1), fixed_NxK.astype(np.int64)


def _rounded(sums: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return bytes of weighted sums, as Pillow rounds and clips them."""
    return np.clip((sums + (1 << (_PRECISION_BITS - 1))) >> _PRECISION_BITS, 0, 255)
