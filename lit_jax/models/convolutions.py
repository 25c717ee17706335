"""What the convolutional towers share: convolutions, batch normalisation, scanned blocks.

Dims: B batch, YxX positions of a feature map, L = Y * X positions, C channels in, D channels
out, K kernel size, N depth. Maps have their channels last.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.config import Remat
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import rematerialized, to_rows

Map = Float[Array, "B Y X C"]
Kernel = Float[Array, "K K 1 C"]
NewMap = Float[Array, "B V U D"]  # made of a `Map`: of any size and width


class PointwiseConv(nn.Module):
    """A convolution with a 1x1 kernel, as a matrix product: on CPU twice as fast, elsewhere the same."""

    features: int
    init_std: float
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxYxXxC: Map) -> Float[Array, "B Y X D"]:
        init = nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", init, (1, 1, x_BxYxXxC.shape[-1], self.features))
        kernel_CxD = jnp.squeeze(kernel, (0, 1)).astype(self.dtype)
        y_BxYxXxD = x_BxYxXxC.astype(self.dtype) @ kernel_CxD
        return _add_bias(self, y_BxYxXxD) if self.use_bias else y_BxYxXxD


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own.

    `padding` is what is added before and after the rows, and the columns.
    """

    kernel_size: int
    stride: int
    padding: tuple[int, int]
    init_std: float
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxYxXxC: Map) -> NewMap:
        init = nn.initializers.normal(self.init_std)
        shape = (self.kernel_size, self.kernel_size, 1, x_BxYxXxC.shape[-1])
        kernel_KxKx1xC = self.param("kernel", init, shape).astype(self.dtype)
        y_BxYxXxC = jax.lax.platform_dependent(
            x_BxYxXxC.astype(self.dtype),
            kernel_KxKx1xC,
            cpu=lambda x, kernel: depthwise_by_shifts(x, kernel, self.stride, self.padding),
            default=lambda x, kernel: depthwise_by_convolution(
                x, kernel, self.stride, self.padding
            ),
        )
        return _add_bias(self, y_BxYxXxC) if self.use_bias else y_BxYxXxC


def depthwise_by_convolution(
    x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int, padding: tuple[int, int]
) -> NewMap:
    return jax.lax.conv_general_dilated(
        x_BxYxXxC,
        kernel_KxKx1xC,
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x_BxYxXxC.shape[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_by_shifts(
    x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int, padding: tuple[int, int]
) -> NewMap:
    """The same as a sum of shifted maps, added up in float32. XLA's CPU backend has no kernel for
    depthwise convolutions: this is 30 times as fast there, and its gradient about 10 times."""
    border = (*padding, 0)
    total = _sum_of_shifts(_pad(x_BxYxXxC, border, border), kernel_KxKx1xC, stride)
    return total.astype(x_BxYxXxC.dtype)


def _shifts_forward(
    x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int, padding: tuple[int, int]
) -> tuple[Any, tuple[Map, Kernel]]:
    y = depthwise_by_shifts(x_BxYxXxC, kernel_KxKx1xC, stride, padding)
    return y, (x_BxYxXxC, kernel_KxKx1xC)


def _shifts_backward(
    stride: int, padding: tuple[int, int], saved: tuple[Map, Kernel], dy_BxVxUxC: NewMap
) -> tuple[Map, Kernel]:
    """Written out because what autodiff makes of 49 shifts takes twice as long to compile and to run."""
    x_BxYxXxC, kernel_KxKx1xC = saved
    size, dy_BxVxUxC = len(kernel_KxKx1xC), dy_BxVxUxC.astype(jnp.float32)
    # From the corner of the first window to that of the last.
    spans = [(length - 1) * stride + 1 for length in dy_BxVxUxC.shape[1:3]]
    # Each value gets back what all windows over it give: the same sum, with the kernel turned round.
    before = size - 1 - padding[0]
    borders = [
        (before, length + size - 1 - before - span, stride - 1)
        for length, span in zip(x_BxYxXxC.shape[1:3], spans, strict=True)
    ]
    dx_BxYxXxC = _sum_of_shifts(_pad(dy_BxVxUxC, *borders), kernel_KxKx1xC[::-1, ::-1], 1)

    border = (*padding, 0)
    padded = _pad(x_BxYxXxC, border, border)

    def row_of_kernel(y: Array) -> Float[Array, "K C"]:
        rows = jax.lax.dynamic_slice_in_dim(padded, y, spans[0], axis=1)[:, ::stride]
        products = (rows[:, :, x : x + spans[1] : stride] * dy_BxVxUxC for x in range(size))
        return jnp.stack([product.sum((0, 1, 2)) for product in products])

    dkernel_KxKx1xC = jax.lax.map(row_of_kernel, jnp.arange(size))[:, :, None]
    return dx_BxYxXxC.astype(x_BxYxXxC.dtype), dkernel_KxKx1xC.astype(kernel_KxKx1xC.dtype)


depthwise_by_shifts.defvjp(_shifts_forward, _shifts_backward)


def _pad(
    x_BxYxXxC: Map, rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> Float[Array, "B V U C"]:
    """In float32 with zeros (before, after, between the values); negative numbers cut off."""
    border = ((0, 0, 0), rows, columns, (0, 0, 0))
    return jax.lax.pad(x_BxYxXxC.astype(jnp.float32), jnp.float32(0), border)


def _sum_of_shifts(x_BxYxXxC: Map, kernel_KxKx1xC: Kernel, stride: int) -> Float[Array, "B V U C"]:
    kernel_KxKxC = jnp.squeeze(kernel_KxKx1xC, 2).astype(jnp.float32)
    size = len(kernel_KxKxC)
    # As far as a window reaches whose first element is the first one.
    rows, columns = (length - size + 1 for length in x_BxYxXxC.shape[1:3])
    shifted = (
        x_BxYxXxC[:, y : y + rows : stride, x : x + columns : stride]
        * _channels(kernel_KxKxC[y, x])
        for y in range(size)
        for x in range(size)
    )
    return functools.reduce(jnp.add, shifted)


def _add_bias(module: nn.Module, x_BxYxXxC: Map) -> Map:
    bias_C = module.param("bias", nn.initializers.zeros, x_BxYxXxC.shape[-1:])
    return x_BxYxXxC + to_rows(bias_C, x_BxYxXxC.shape, x_BxYxXxC.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (1502.03167), computed in float32: torch's BatchNorm2d.

    The running statistics `mean` and `var` are among the parameters, so they are loaded, locked and
    saved like these, but they have no gradient.

    Not `deterministic`: a map is normalised by the mean and variance of its whole batch, on whatever
    devices that lies, and gradients flow through both. The collection 'batch_stats', where it is
    mutable, gets the new running statistics at the paths of the old ones, (1 - momentum) * old +
    momentum * that of the batch.
    """

    epsilon: float
    momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxYxXxC: Map, deterministic: bool) -> Map:
        shape, ones, zeros = x_BxYxXxC.shape[-1:], nn.initializers.ones, nn.initializers.zeros
        scale_C = self.param("scale", ones, shape).astype(jnp.float32)
        bias_C = self.param("bias", zeros, shape).astype(jnp.float32)
        old = [self.param("mean", zeros, shape), self.param("var", ones, shape)]
        mean_C, var_C = (jax.lax.stop_gradient(leaf.astype(jnp.float32)) for leaf in old)
        x_BxYxXxC = x_BxYxXxC.astype(jnp.float32)
        if not deterministic:
            running = {"mean": mean_C, "var": var_C}
            mean_C = x_BxYxXxC.mean((0, 1, 2))
            var_C = jnp.square(x_BxYxXxC - _channels(mean_C)).mean((0, 1, 2))
            count = x_BxYxXxC.size // x_BxYxXxC.shape[-1]
            self._put_statistics(running, {"mean": mean_C, "var": var_C * _unbiased(count)})
        factor_C = jax.lax.rsqrt(var_C + self.epsilon) * scale_C
        normed_BxYxXxC = (x_BxYxXxC - _channels(mean_C)) * _channels(factor_C) + _channels(bias_C)
        return normed_BxYxXxC.astype(self.dtype)

    def _put_statistics(self, old: dict[str, Array], of_batch: dict[str, Array]) -> None:
        if self.is_mutable_collection("batch_stats"):
            for name, value in of_batch.items():
                new = (1 - self.momentum) * old[name] + self.momentum * value
                self.put_variable("batch_stats", name, new)


def _channels(x_C: Array) -> Float[Array, "1 1 1 C"]:
    return x_C[None, None, None]


def _unbiased(count: int) -> float:
    """From a variance over so many values to the estimate of that of all values."""
    if count < 2:
        raise UserError(
            "Batch normalisation cannot train on a feature map of one position of one image; set "
            "config.batch_size or config.data.image_size higher."
        )
    return count / (count - 1)


def positions(x_BxYxXxC: Map) -> Float[Array, "B L C"]:
    """A map as a sequence of L = Y * X positions, row by row."""
    return x_BxYxXxC.reshape(len(x_BxYxXxC), -1, x_BxYxXxC.shape[-1])


def scan_blocks(
    block: nn.Module, x_BxYxXxC: Map, rates_N: np.ndarray, deterministic: bool, remat: Remat
) -> Map:
    """Applies as many equal blocks, one after another, as there are dropout rates.

    The parameters of `block` get a leading depth axis. Neither the time to compile nor the size of the
    program grows with depth.
    """

    def step(block: nn.Module, x_BxYxXxC: Array, rate: Array) -> tuple[Array, None]:
        return shard_batch(block(x_BxYxXxC, rate, deterministic)), None

    scan = nn.scan(
        rematerialized(step, remat, prevent_cse=False),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(rates_N),
    )
    return scan(block, x_BxYxXxC, jnp.asarray(rates_N, jnp.float32))[0]
