"""Sums of exponentials of logits, added up tile by tile without overflow.

Dims: R rows of a tile.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# The lowest finite float32. The difference of two of these is 0, where that of two -inf would be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


class LogSum(NamedTuple):
    """The logarithms of sums of exponentials, each as its largest exponent and the sum relative to it.

    A single number near 100 would lose digits with every tile that is added.
    """

    largest: Float[Array, " R"]
    relative: Float[Array, " R"]

    @classmethod
    def over_axis(cls, logits_RxR: Float[Array, "R R"], axis: int) -> "LogSum":
        """Return the log-sum of the logits along an axis."""
        largest = logits_RxR.max(axis, keepdims=True)
        return cls(largest.squeeze(axis), jnp.exp(logits_RxR - largest).sum(axis))

    def plus(self, other: "LogSum") -> "LogSum":
        """Return the log-sum of both sets of logits."""
        # Both sums are rescaled to the common largest exponent, so no exponential overflows.
        largest_R = jnp.maximum(self.largest, other.largest)
        ours_R, theirs_R = (x.relative * jnp.exp(x.largest - largest_R) for x in (self, other))
        return LogSum(largest_R, ours_R + theirs_R)

    def minus(self, logit_R: Float[Array, " R"]) -> Float[Array, " R"]:
        """Return the logarithm minus a logit; the subtraction of the large numbers comes first."""
        return jnp.log(self.relative) + (self.largest - logit_R)

    def normaliser(self) -> "Normaliser":
        """Return the factors of the probabilities of these logits."""
        # There is one division for each row instead of one for each logit.
        return Normaliser(self.largest, 1 / self.relative)


class Normaliser(NamedTuple):
    """The factors that make probabilities of the exponentials of logits: exp(logit - largest) * inverse."""

    largest: Float[Array, " R"]
    inverse: Float[Array, " R"]

    def probabilities(self, logits_RxR: Float[Array, "R R"], axis: int) -> Float[Array, "R R"]:
        """Return the softmax probabilities along `axis`."""
        largest, inverse = (jnp.expand_dims(x, axis) for x in self)
        return jnp.exp(logits_RxR - largest) * inverse
