"""Sums of exponentials of logits, added up tile by tile without overflow.

Dims: R rows of a tile.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
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
    def over_axis(cls, tiles: Sequence[Float[Array, "R R"]], axis: int) -> "LogSum":
        """Return the log-sum of the logits along an axis, over all tiles."""
        # With one largest logit for several tiles, the TPU compiler reads all of them in one pass.
        largest_R = functools.reduce(jnp.maximum, (tile.max(axis) for tile in tiles))
        largest = jnp.expand_dims(largest_R, axis)
        relative = (jnp.exp(tile - largest).sum(axis) for tile in tiles)
        return cls(largest_R, functools.reduce(jnp.add, relative))

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


def _is_sum(node: Any) -> bool:
    return isinstance(node, LogSum)


def initial_sums(like: Any) -> Any:
    """Return the sums over no tile as a tree of LogSum and arrays, shaped like `like`."""

    def empty(node: Any) -> Any:
        if _is_sum(node):
            return LogSum(jnp.full_like(node.largest, LOWEST), jnp.zeros_like(node.relative))
        return jnp.zeros_like(node)

    return jax.tree.map(empty, like, is_leaf=_is_sum)


def add_sums(a: Any, b: Any) -> Any:
    """Return the sums of both trees of LogSum and arrays."""
    return jax.tree.map(lambda x, y: x.plus(y) if _is_sum(x) else x + y, a, b, is_leaf=_is_sum)
