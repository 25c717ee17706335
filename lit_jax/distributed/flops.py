"""Count the FLOPs of a program's matrix products and convolutions.

The traced program is counted, because the compiler's own analysis counts the body of a loop only once.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

Jaxpr = Any  # core.Jaxpr or core.ClosedJaxpr

# The bfloat16 passes of the matrix unit for one product of float32 matrices, by the name of its precision.
_PASSES = {
    "HIGH": 3,
    "HIGHEST": 6,
    "BF16_BF16_F32_X3": 3,
    "BF16_BF16_F32_X6": 6,
    "BF16_BF16_F32_X9": 9,
}


def matmul_flops(jaxpr: Jaxpr) -> int:
    """Return the FLOPs over all devices, where a multiply-add counts as two.

    A product counts once for each bfloat16 pass of its precision. Recomputation counts again, and a
    conditional counts as its most expensive branch, or as the branch for TPUs. A Pallas kernel counts by its
    stated cost, or else as its program at all points of the grid.

    Raises ValueError for a product in a loop whose number of iterations is known only at run time.
    """
    inner: core.Jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation) for equation in inner.eqns)


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _passes(equation) * _dot_flops(equation)
    if name == "conv_general_dilated":
        return _passes(equation) * _convolution_flops(equation)
    # The body of a scan runs `length` times; its equations appear only once.
    if name == "scan":
        return params["length"] * matmul_flops(params["jaxpr"])
    if name == "cond":
        return max(map(matmul_flops, _branches(params)))
    # The kernel's own program has another form of the products.
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    inside = sum(map(matmul_flops, _jaxprs(params)))
    # The kernel's program appears only once; it runs at each point of the grid.
    if name == "pallas_call":
        return inside * math.prod(params["grid_mapping"].grid)
    if name == "while" and inside:
        raise ValueError("A matrix product in a loop of unknown length cannot be counted.")
    # The body of a shard_map is the work of one device along the manual axes.
    if name == "shard_map":
        return inside * math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        )
    return inside


def _branches(params: Any) -> list[Jaxpr]:
    """Return the branches of a conditional that a TPU may run."""
    # A conditional over platforms names those of each branch; the default branch has None.
    platforms = params.get("branches_platforms")
    if platforms is None:
        return list(params["branches"])
    pairs = list(zip(params["branches"], platforms, strict=True))
    of_tpu = [branch for branch, names in pairs if names is not None and "tpu" in names]
    return of_tpu or [branch for branch, names in pairs if names is None]


def _passes(equation: Any) -> int:
    """Return the number of passes of the matrix unit over bfloat16 parts of the inputs."""
    precision = equation.params["precision"]
    # The two sides have a precision each, and the product takes the higher.
    sides = precision if isinstance(precision, tuple) else (precision,)
    if all(variable.aval.dtype.itemsize <= 2 for variable in equation.invars):
        return 1
    return max(_PASSES.get(getattr(side, "name", ""), 1) for side in sides)


def _dot_flops(equation: Any) -> int:
    """Return the FLOPs of a product of matrices, or 0 for a product with a vector."""
    # The compiler turns a product with a vector into a multiplication and a sum, without the matrix unit.
    contracted, batch = equation.params["dimension_numbers"]
    sides = [variable.aval for variable in equation.invars]
    # A side without free axes is a vector, or a batch of vectors.
    if any(
        side.ndim == len(axes) + len(batch_axes)
        for side, axes, batch_axes in zip(sides, contracted, batch, strict=True)
    ):
        return 0
    (out,) = equation.outvars
    return 2 * out.aval.size * math.prod(sides[0].shape[axis] for axis in contracted[0])


def _convolution_flops(equation: Any) -> int:
    """Return the FLOPs of the whole kernel at each output position, inserted zeros included."""
    kernel, (out,) = equation.invars[1].aval, equation.outvars
    spec = equation.params["dimension_numbers"].rhs_spec
    # The kernel's output features are not summed over; its input features are already those of one group.
    return 2 * out.aval.size * kernel.size // kernel.shape[spec[0]]


def _jaxprs(params: Any) -> Iterator[Jaxpr]:
    """Yield the programs inside an equation, such as those of pjit, remat, custom_vjp and shard_map."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield item
