"""The FLOPs of a program's matrix products and convolutions, counted where they are known exactly: before the
compiler, whose own count takes the body of a loop once.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

Jaxpr = Any  # core.Jaxpr or core.ClosedJaxpr


def matmul_flops(jaxpr: Jaxpr) -> int:
    """Over all devices: two for each multiplication and addition. What is computed again counts again.

    Of a conditional the most expensive branch counts. Raises ValueError for a product in a loop of which only
    the run knows how often it turns.
    """
    inner: core.Jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation) for equation in inner.eqns)


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "scan":
        return params["length"] * matmul_flops(params["jaxpr"])
    if name == "cond":
        return max(map(matmul_flops, params["branches"]))
    inside = sum(map(matmul_flops, _jaxprs(params)))
    if name == "while" and inside:
        raise ValueError("A matrix product in a loop of unknown length cannot be counted.")
    if name == "shard_map":  # its body is what one device does
        return inside * math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        )
    return inside


def _of_dot(equation: Any) -> int:
    """None of a product with a vector: the compiler makes a sum of it, in which no matrix unit has a part."""
    contracted, batch = equation.params["dimension_numbers"]
    sides = [variable.aval for variable in equation.invars]
    if any(
        side.ndim == len(axes) + len(of_batch)
        for side, axes, of_batch in zip(sides, contracted, batch, strict=True)
    ):
        return 0
    (out,) = equation.outvars
    return 2 * out.aval.size * math.prod(sides[0].shape[axis] for axis in contracted[0])


def _of_convolution(equation: Any) -> int:
    """As many as its kernel has for each output position. That of a gradient has its zeros counted, too."""
    kernel, (out,) = equation.invars[1].aval, equation.outvars
    spec = equation.params["dimension_numbers"].rhs_spec
    # The axis of output features is not summed over; that of input features is per group already.
    return 2 * out.aval.size * kernel.size // kernel.shape[spec[0]]


def _jaxprs(params: Any) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield item
