"""A window of an enlarged image, computed without the rest of the image; bit-equal to Pillow's `resize`.

Pillow can resize a box of an image, but it rounds the box to float32, so the result is up to 21 grey levels
away from the same window of the whole image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

# The number of fractional bits of a weight, as in Pillow's libImaging/Resample.c.
_PRECISION_BITS = 22
# Not NumPy's sine, which differs in the last bit from the C library's sine that Pillow calls.
_sin, _cos = np.vectorize(math.sin, [float]), np.vectorize(math.cos, [float])


class _Filter(NamedTuple):
    # The radius in source pixels beyond which all weights are 0.
    support: float
    # The map from distances to the centre, in pixels, to weights.
    weight: Callable[[np.ndarray], np.ndarray]


# The filters repeat the expressions of Resample.c in their order: floating point is not associative.
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
    """Return `image.resize(size, resample).crop(window)` for an RGB image.

    Args:
        size: (width, height) of the whole result, larger than the image in both directions. For a direction
            that shrinks, the order of Pillow's two passes depends on Pillow's version.
        window: (left, top, right, bottom); the part outside the result is black.
        resample: one of `FILTERS`.
    """
    kind = FILTERS[Image.Resampling(resample)]
    left, top, right, bottom = window
    result_HxWx3 = np.zeros((bottom - top, right - left, 3), np.uint8)
    # Only the part of the window that lies inside the result is computed.
    columns = range(max(left, 0), min(right, size[0]))
    rows = range(max(top, 0), min(bottom, size[1]))
    if columns and rows:
        x_NxK, weight_NxK = _weights(image.width, size[0], columns, kind)
        y_MxL, weight_MxL = _weights(image.height, size[1], rows, kind)
        x, y = int(x_NxK.min()), int(y_MxL.min())
        source = image.crop((x, y, int(x_NxK.max()) + 1, int(y_MxL.max()) + 1))
        # As in Pillow: first along rows, then along columns, with rounding to bytes in between.
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
    """Return the K source pixels that contribute to each `wanted` pixel of the result, and their weights.

    Args:
        length, target: the number of pixels in this direction before and after resizing.

    Weights are multiples of 2^-22 as integers. If fewer than K pixels contribute, the other weights are 0.
    """
    # Pillow keeps the box of the source, here the whole length, in float32.
    scale = float(np.float32(length)) / target
    centre_Nx1 = ((np.arange(wanted.start, wanted.stop) + 0.5) * scale)[:, None]
    first_Nx1 = np.maximum((centre_Nx1 - kind.support + 0.5).astype(np.int64), 0)
    stop_Nx1 = np.minimum((centre_Nx1 + kind.support + 0.5).astype(np.int64), length)
    at_NxK = first_Nx1 + np.arange(int((stop_Nx1 - first_Nx1).max()))
    weight_NxK = kind.weight(at_NxK - centre_Nx1 + 0.5)
    weight_NxK = np.where(at_NxK < stop_Nx1, weight_NxK, 0.0)
    # `cumsum` adds one by one as Pillow does; NumPy's pairwise `sum` would round differently.
    sum_Nx1 = np.cumsum(weight_NxK, axis=1)[:, -1:]
    weight_NxK = weight_NxK / np.where(sum_Nx1 == 0, 1.0, sum_Nx1)
    fixed_NxK = np.trunc(weight_NxK * (1 << _PRECISION_BITS) + np.copysign(0.5, weight_NxK))
    return np.minimum(at_NxK, length - 1), fixed_NxK.astype(np.int64)


def _rounded(sums: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return weighted sums as pixel values 0..255, rounded and clipped as in Pillow."""
    return np.clip((sums + (1 << (_PRECISION_BITS - 1))) >> _PRECISION_BITS, 0, 255)
