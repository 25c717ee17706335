"""The layers that the convolutional towers share: convolutions, batch normalisation, scanned blocks.

Dims: B batch, YxX positions of a feature map, L = Y * X positions, C channels in, D channels
out, K kernel size, N depth. Maps have their channels last.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.config import Remat
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models import ops
from lit_jax.models.layers import broadcast_float32, rematerialized, stacks
from lit_jax.models.ops import Map, NewMap


class PointwiseConv(nn.Module):
    """A convolution with a 1x1 kernel, computed as a matrix product, which is twice as fast on CPU."""

    features: int
    init_std: float
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxYxXxC: Map) -> Float[Array, "B Y X D"]:
        init = nn.initializers.normal(self.init_std)
        # The parameter keeps the shape of a convolution, which the checkpoints have.
        kernel = self.param("kernel", init, (1, 1, x_BxYxXxC.shape[-1], self.features))
        kernel_CxD = jnp.squeeze(kernel, (0, 1)).astype(self.dtype)
        y_BxYxXxD = x_BxYxXxC.astype(self.dtype) @ kernel_CxD
        return _add_bias(self, y_BxYxXxD) if self.use_bias else y_BxYxXxD


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own.

    Attributes:
        padding: the rows added before and after the map; as many columns are added at the sides.
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
        # The axis of length 1 is the number of input channels of each group.
        kernel_KxKx1xC = self.param("kernel", init, shape).astype(self.dtype)
        y_BxYxXxC = ops.depthwise_conv(
            x_BxYxXxC.astype(self.dtype), kernel_KxKx1xC, self.stride, self.padding
        )
        return _add_bias(self, y_BxYxXxC) if self.use_bias else y_BxYxXxC


def _add_bias(module: nn.Module, x_BxYxXxC: Map) -> Map:
    bias_C = module.param("bias", nn.initializers.zeros, x_BxYxXxC.shape[-1:])
    return x_BxYxXxC + broadcast_float32(bias_C, x_BxYxXxC.shape, x_BxYxXxC.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (1502.03167), computed in float32: torch's BatchNorm2d.

    The running statistics `mean` and `var` are parameters without gradient, so that they are loaded, locked
    and saved like other parameters.

    Unless `deterministic`, a map is normalised by the mean and variance of the global batch, over all
    devices, and gradients flow through both. If the collection 'batch_stats' is mutable, it gets the new
    running statistics, (1 - momentum) * old + momentum * batch, at the paths of the old ones.
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
        # Running statistics are not trained, although they are in the tree of parameters.
        mean_C, var_C = (jax.lax.stop_gradient(leaf.astype(jnp.float32)) for leaf in old)
        x_BxYxXxC = x_BxYxXxC.astype(jnp.float32)
        if not deterministic:
            running = {"mean": mean_C, "var": var_C}
            mean_C = x_BxYxXxC.mean((0, 1, 2))
            # The squared differences are averaged, because E[x^2] - E[x]^2 cancels in float32.
            var_C = jnp.square(x_BxYxXxC - _channels(mean_C)).mean((0, 1, 2))
            # torch normalises by the biased variance and keeps the unbiased one in its running statistics.
            count = x_BxYxXxC.size // x_BxYxXxC.shape[-1]
            self._put_statistics(running, {"mean": mean_C, "var": var_C * _unbiased(count)})
        factor_C = jax.lax.rsqrt(var_C + self.epsilon) * scale_C
        normed_BxYxXxC = (x_BxYxXxC - _channels(mean_C)) * _channels(factor_C) + _channels(bias_C)
        return normed_BxYxXxC.astype(self.dtype)

    def _put_statistics(self, old: dict[str, Array], of_batch: dict[str, Array]) -> None:
        # `init` and plain calls of the module do not ask for new statistics.
        if self.is_mutable_collection("batch_stats"):
            for name, value in of_batch.items():
                new = (1 - self.momentum) * old[name] + self.momentum * value
                self.put_variable("batch_stats", name, new)


def _channels(x_C: Array) -> Float[Array, "1 1 1 C"]:
    return x_C[None, None, None]


def _unbiased(count: int) -> float:
    """Return the factor that turns the variance of `count` values into the unbiased estimate.

    Raises UserError for a single value, which has no such estimate.
    """
    if count < 2:
        raise UserError(
            "Batch normalisation cannot train on a feature map of one position of one image; raise "
            "config.batch_size or config.data.image_size."
        )
    return count / (count - 1)


def positions(x_BxYxXxC: Map) -> Float[Array, "B L C"]:
    """Reshape a map into a sequence of L = Y * X positions, row by row."""
    return x_BxYxXxC.reshape(len(x_BxYxXxC), -1, x_BxYxXxC.shape[-1])


def scan_blocks(
    make_block: Callable[..., nn.Module],
    x_BxYxXxC: Map,
    of_blocks: Any,
    deterministic: bool,
    remat: Remat,
    first: int = 0,
    cuts: tuple[int, ...] = (),
) -> Map:
    """Apply equal blocks one after another, as many as the arrays of `of_blocks` are long.

    The parameters of a stack of blocks have a leading depth axis. Neither the time to compile nor the size of
    the program grows with depth.

    Args:
        make_block: makes a block with a `name`, which is called with the map, its entry of `of_blocks`, and
            `deterministic`.
        of_blocks: an array, or a tree of arrays, with a value for each block, such as its probability of drop
            path.
        first: the number of the first block.
        cuts: the numbers of the blocks at which a new stack begins.
    """

    def step(block: nn.Module, x_BxYxXxC: Array, of_block: Any) -> tuple[Array, None]:
        return shard_batch(block(x_BxYxXxC, of_block, deterministic)), None

    depth = len(jax.tree.leaves(of_blocks)[0])
    for name, blocks in stacks(first, depth, cuts):
        scan = nn.scan(
            # The loops of a scan and of its gradient keep the compiler from merging the recomputation with
            # the original.
            rematerialized(step, remat, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            # Each block of a stack draws its own parameters and its own dropout.
            split_rngs={"params": True, "dropout": True},
            length=blocks.stop - blocks.start,
        )
        # The values are scanned along with the parameters, because all blocks share one compiled body.
        of_stack = jax.tree.map(lambda x_N, blocks=blocks: x_N[blocks], of_blocks)
        x_BxYxXxC, _ = scan(make_block(name=name), x_BxYxXxC, of_stack)
    return x_BxYxXxC
