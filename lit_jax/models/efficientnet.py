"""EfficientNet (https://arxiv.org/abs/1905.11946) and ALIGN's image tower (https://arxiv.org/abs/2102.05918).

Numerically they are Hugging Face's EfficientNetModel and AlignVisionModel.

Dims: B batch, HxW pixels, YxX positions of a feature map, L = Y * X positions of the last one,
C channels, D width of the last map, N depth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.config import Remat
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.convolutions import (
    BatchNorm,
    DepthwiseConv,
    Map,
    NewMap,
    PointwiseConv,
    positions,
    scan_blocks,
)
from lit_jax.models.layers import activation, drop, rematerialized, scale_float32
from lit_jax.models.patches import Size, check_channels
from lit_jax.models.tower import ImageTower, TowerOutput, cuts_under

# Hugging Face's expansion layers keep torch's default momentum; all other layers take the config's.
_EXPANSION_MOMENTUM = 0.1
# The width of EfficientNet-B0's stem.
_STEM_WIDTH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """The first block of a stage.

    Attributes:
        width: the number of channels of the incoming map.
        new_width: the number of channels of the outgoing map.
        padding: the rows (and columns) of zeros before and after the map.
    """

    width: int
    new_width: int
    expand_ratio: int
    kernel_size: int
    stride: int
    padding: tuple[int, int]

    @property
    def following(self) -> "BottleneckConfig":
        """The config of all further blocks of the stage, which keep width and resolution."""
        return dataclasses.replace(
            self, width=self.new_width, stride=1, padding=_same(self.kernel_size)
        )


def _same(kernel_size: int) -> tuple[int, int]:
    """Return the padding, before and after, that keeps the size of a map at stride 1."""
    return (kernel_size - 1) // 2, kernel_size // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "efficientnet"
    num_channels: int = 3
    image_size: Size = 600
    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    # The indices of blocks that are padded alike on all sides.
    depthwise_padding: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    pooling_type: str = "mean"
    initializer_range: float = 0.02
    batch_norm_eps: float = 0.001
    # As in torch, the momentum is the share of the batch in a new running statistic. The value comes from
    # TensorFlow, where it is the share of the old statistic; override it with 0.01 to train as there.
    batch_norm_momentum: float = 0.99
    drop_connect_rate: float = 0.2

    @property
    def has_top(self) -> bool:
        """True if a last convolution widens the map."""
        return True

    def channels(self, base: int) -> int:
        """Return the number of channels of a map that has `base` channels in EfficientNet-B0.

        The number is the multiple of depth_divisor nearest to `base` times the width coefficient, but not
        less than 0.9 times that product.
        """
        wanted, divisor = base * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        # Rounding must not remove more than 10 % of the channels, as in the reference code of EfficientNet.
        return rounded + divisor if rounded < 0.9 * wanted else rounded

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of blocks of each stage."""
        return tuple(math.ceil(self.depth_coefficient * n) for n in self.num_block_repeats)

    def first_block(self, stage: int) -> BottleneckConfig:
        """Return the config of the first block of a stage."""
        # At stride 2, TensorFlow's padding 'SAME' adds one row less before a map of even size than after it,
        # and as many on both sides of an odd one. depthwise_padding has the blocks whose map is odd.
        size, stride = self.kernel_sizes[stage], self.strides[stage]
        if stride == 1:
            padding = _same(size)
        elif sum(self.depths[:stage]) in self.depthwise_padding:
            padding = (size // 2, size // 2)
        else:
            padding = (size // 2 - 1, size // 2)
        return BottleneckConfig(
            width=self.channels(self.in_channels[stage]),
            new_width=self.channels(self.out_channels[stage]),
            expand_ratio=self.expand_ratios[stage],
            kernel_size=size,
            stride=stride,
            padding=padding,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignVisionConfig(EfficientNetConfig):
    """The fields of ALIGN's image tower, which ends without the last convolution."""

    model_type: str = "align_vision_model"

    @property
    def has_top(self) -> bool:
        return False


class EfficientNet(ImageTower):
    """The image tower. Its pooler is the mean or the maximum of each channel, as pooling_type says."""

    config: EfficientNetConfig

    poolings = ("pooler", "mean")

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Encode pixels that the image processor has normalised; images may have any size.

        The last hidden state has the positions of the last map. Unless `deterministic`, there is dropout by
        the rng 'dropout', and `BatchNorm` uses the batch. Raises UserError for stages that do not fit.
        """
        cfg = self.config
        check_channels(pixel_values_BxHxWxC, cfg.num_channels)
        # Hugging Face builds convolutions from in_channels, which must equal the channels that arrive.
        incoming = (_STEM_WIDTH, *cfg.out_channels[:-1])
        if [*map(cfg.channels, cfg.in_channels)] != [*map(cfg.channels, incoming)]:
            raise UserError(
                f"The config of the EfficientNet has in_channels={list(cfg.in_channels)}, but its stages get "
                f"{list(incoming)}; correct its config.json."
            )
        x_BxYxXxC = _conv_norm(
            cfg,
            functools.partial(
                nn.Conv,
                cfg.channels(_STEM_WIDTH),
                (3, 3),
                strides=2,
                # TensorFlow's padding 'SAME' for an even image at stride 2.
                padding=((0, 1), (0, 1)),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(cfg.initializer_range),
            ),
            self.dtype,
            "embeddings",
        )(pixel_values_BxHxWxC, deterministic)
        cuts = cuts_under("encoder", self.cuts)
        encoder = EfficientNetStages(cfg, self.dtype, self.remat, cuts, name="encoder")
        x_BxYxXxD = encoder(x_BxYxXxC, deterministic)
        x_BxLxD = positions(x_BxYxXxD)
        if cfg.pooling_type not in ("mean", "max"):
            raise UserError(
                f"The model's config.json has pooling_type {cfg.pooling_type!r}, which lit_jax does not "
                "have; correct it to 'mean' or 'max'."
            )
        if self.pooling == "pooler" and cfg.pooling_type == "max":
            # max() has a gradient of NaN if the compiler computes x twice with different rounding.
            top_Bx1xD = x_BxLxD.argmax(1, keepdims=True)
            pooled_BxD = jnp.squeeze(jnp.take_along_axis(x_BxLxD, top_Bx1xD, 1), 1)
        else:
            pooled_BxD = x_BxLxD.mean(1)
        return TowerOutput(x_BxLxD, pooled_BxD)


class EfficientNetStages(nn.Module):
    """The stages: the first block of each is `layer_N`; the others, equal and scanned, are `layer_from_N`.

    N counts the blocks of all stages. If the collection 'intermediates' is mutable, it gets 'input' and the
    output of each block as 'hidden_state'.
    """

    config: EfficientNetConfig
    dtype: Any
    remat: Remat = "none"
    cuts: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x_BxYxXxC: Map, deterministic: bool) -> NewMap:
        cfg, n = self.config, 0

        def call(block: nn.Module, x_BxYxXxC: Array) -> Array:
            return shard_batch(block(x_BxYxXxC, None, deterministic))

        self.sow("intermediates", "input", x_BxYxXxC)
        for stage, depth in enumerate(cfg.depths):
            config = cfg.first_block(stage)
            # The first block of a stage changes the shape of the map, so it cannot be in a scan.
            first = Bottleneck(cfg, config, self.dtype, name=f"layer_{n}")
            x_BxYxXxC = rematerialized(call, self.remat, prevent_cse=True)(first, x_BxYxXxC)
            if depth > 1:
                others = functools.partial(Bottleneck, cfg, config.following, self.dtype)
                # The rate rises linearly with the number of the block, as in the reference code.
                numbers_N = np.arange(n + 1, n + depth, dtype=np.float32)
                rates_N = cfg.drop_connect_rate * numbers_N / sum(cfg.depths)
                x_BxYxXxC = scan_blocks(
                    others, x_BxYxXxC, rates_N, deterministic, self.remat, n + 1, self.cuts
                )
            n += depth
        if cfg.has_top:
            conv = _pointwise(cfg, cfg.channels(1280), self.dtype)
            x_BxYxXxC = _conv_norm(cfg, conv, self.dtype, "top")(x_BxYxXxC, deterministic)
        return x_BxYxXxC


class Bottleneck(nn.Module):
    """An inverted bottleneck (1801.04381) with squeeze and excitation."""

    config: EfficientNetConfig
    block: BottleneckConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxYxXxC: Map, rate: Float[Array, ""] | None, deterministic: bool
    ) -> NewMap:
        """Return the map plus the block's output after dropout with `rate`; None returns the output alone."""
        cfg, block, dtype = self.config, self.block, self.dtype
        h = x_BxYxXxC
        if block.expand_ratio != 1:
            wide = _pointwise(cfg, block.width * block.expand_ratio, dtype)
            expansion = _conv_norm(cfg, wide, dtype, "expansion", momentum=_EXPANSION_MOMENTUM)
            h = expansion(h, deterministic)
        depthwise = functools.partial(
            DepthwiseConv,
            block.kernel_size,
            block.stride,
            block.padding,
            cfg.initializer_range,
            dtype,
        )
        h = _conv_norm(cfg, depthwise, dtype, "depthwise")(h, deterministic)
        # The width before the expansion decides, as in the paper's reference code.
        squeezed = max(1, int(block.width * cfg.squeeze_expansion_ratio))
        h = SqueezeExcite(cfg, squeezed, dtype, name="squeeze_excite")(h)
        narrow = _pointwise(cfg, block.new_width, dtype)
        h = _conv_norm(cfg, narrow, dtype, "projection", act="linear")(h, deterministic)
        if rate is not None:
            if cfg.drop_connect_rate and not deterministic:
                # Hugging Face implements drop connect as dropout of single values, not of whole rows.
                h = drop(h, rate, self.make_rng("dropout"), h.shape)
            h = x_BxYxXxC + h
        self.sow("intermediates", "hidden_state", h)
        return h


class SqueezeExcite(nn.Module):
    """A squeeze-and-excitation layer (1709.01507): an MLP of the channel means gives a factor per channel."""

    config: EfficientNetConfig
    squeezed: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxYxXxC: Map) -> Map:
        def conv(features: int, name: str) -> nn.Module:
            return PointwiseConv(
                features, self.config.initializer_range, self.dtype, use_bias=True, name=name
            )

        mean_Bx1x1xC = x_BxYxXxC.mean((1, 2), keepdims=True)
        h = activation(self.config.hidden_act)(conv(self.squeezed, "reduce")(mean_Bx1x1xC))
        return scale_float32(x_BxYxXxC, nn.sigmoid(conv(x_BxYxXxC.shape[-1], "expand")(h)))


class ConvNorm(nn.Module):
    """A convolution, followed by batch normalisation and an activation."""

    make_convolution: Callable[..., nn.Module]
    epsilon: float
    momentum: float
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BxYxXxC: Map, deterministic: bool) -> NewMap:
        h = self.make_convolution(name="convolution")(x_BxYxXxC)
        h = BatchNorm(self.epsilon, self.momentum, self.dtype, name="batchnorm")(h, deterministic)
        return activation(self.act)(h)


def _conv_norm(
    cfg: EfficientNetConfig,
    make_convolution: Callable[..., nn.Module],
    dtype: Any,
    name: str,
    *,
    momentum: float | None = None,
    act: str | None = None,
) -> ConvNorm:
    """Return a ConvNorm whose momentum and activation are the config's unless they are given."""
    return ConvNorm(
        make_convolution,
        cfg.batch_norm_eps,
        cfg.batch_norm_momentum if momentum is None else momentum,
        cfg.hidden_act if act is None else act,
        dtype,
        name=name,
    )


def _pointwise(cfg: EfficientNetConfig, features: int, dtype: Any) -> Callable[..., nn.Module]:
    return functools.partial(PointwiseConv, features, cfg.initializer_range, dtype)
