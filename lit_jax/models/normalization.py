"""The normalisation of pixels: bytes to the floats that an image tower expects."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


@dataclasses.dataclass(frozen=True)
class Normalization:
    """A map value * scale + offset for each channel, which joins transformers' rescale and normalize.

    The result equals that of transformers up to the rounding of float32.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def through(
        cls, black_C: Float[np.ndarray, " C"], white_C: Float[np.ndarray, " C"]
    ) -> "Normalization":
        """Return the normalisation that maps 0 to `black_C` and 255 to `white_C`."""
        # float64 keeps the rounding out of the two constants; the dataclass stays hashable with tuples.
        scale_C = (white_C.astype(np.float64) - black_C) / 255
        return cls(tuple(scale_C.tolist()), tuple(black_C.tolist()))

    def __call__(self, pixels: UInt8[Any, "*rest C"]) -> Float[Any, "*rest C"]:
        """Return the float32 values of a JAX or a NumPy array.

        Worker processes of the loader have no JAX, so this method calls NumPy and the array's own operators.
        """
        # Explicit axes satisfy a strict rank promotion of jax.numpy.
        ones = (1,) * (pixels.ndim - 1)
        scale, offset = (
            np.asarray(x, np.float32).reshape(*ones, -1) for x in (self.scale, self.offset)
        )
        return pixels.astype(np.float32) * scale + offset
