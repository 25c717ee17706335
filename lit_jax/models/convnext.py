"""ConvNeXt, ConvNeXt V2 and DINOv3's ConvNeXt.

The papers are https://arxiv.org/abs/2201.03545, https://arxiv.org/abs/2301.00808 and
https://arxiv.org/abs/2508.10104. Numerically the towers are Hugging Face's ConvNextModel, ConvNextV2Model and
DINOv3ConvNextModel.

Dims: B batch, HxW pixels, YxX positions of a feature map, L = Y * X positions, C channels,
D width of the last map, F four times the width, N depth.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.config import Remat
from lit_jax.models.convolutions import DepthwiseConv, Map, NewMap, positions, scan_blocks
from lit_jax.models.layers import LayerNorm, activation, dense, drop
from lit_jax.models.patches import PatchEmbeddings, Size
from lit_jax.models.tower import ImageTower, TowerOutput, cuts_under
from lit_jax.models.transformer import LayerScale

# All versions have the kernel size of 2201.03545, section 2.5; config.json has no field for it.
_KERNEL_SIZE = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNextFields:
    """The fields of config.json that change a number and that every version has.

    Names and defaults are Hugging Face's, here and in the configs that derive from this class.
    """

    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    drop_path_rate: float = 0.0
    image_size: Size = 224

    @property
    def norm_epsilon(self) -> float:
        """The epsilon of every normalisation but the last."""
        # Hugging Face's code has this number, whatever config.json says.
        return 1e-6

    @property
    def layer_scale(self) -> float | None:
        """The initial value of the trained factor for each feature of a block's output; None: no factor."""
        return None

    @property
    def response_norm(self) -> bool:
        """True if the blocks have global response normalisation."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNextConfig(ConvNextFields):
    """The fields of ConvNeXt."""

    model_type: str = "convnext"
    patch_size: Size = 4
    num_stages: int = 4
    # The epsilon of the pooler's normalisation alone.
    layer_norm_eps: float = 1e-12
    # 0 means no factor.
    layer_scale_init_value: float = 1e-6

    @property
    def layer_scale(self) -> float | None:
        return self.layer_scale_init_value if self.layer_scale_init_value > 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNextV2Config(ConvNextFields):
    """The fields of ConvNeXt V2, which has global response normalisation instead of layer scale."""

    model_type: str = "convnextv2"
    patch_size: Size = 4
    num_stages: int = 4
    # The epsilon of the pooler's normalisation alone.
    layer_norm_eps: float = 1e-12

    @property
    def response_norm(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov3ConvNextConfig(ConvNextFields):
    """The fields of DINOv3's ConvNeXt, whose config.json has neither patch_size nor num_stages."""

    model_type: str = "dinov3_convnext"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float = 1e-6

    @property
    def patch_size(self) -> Size:
        """The size of a patch in pixels, which is the same in all models of the family."""
        return 4

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(self.hidden_sizes)

    @property
    def norm_epsilon(self) -> float:
        return self.layer_norm_eps

    @property
    def layer_scale(self) -> float | None:
        return self.layer_scale_init_value


Config = ConvNextConfig | ConvNextV2Config | Dinov3ConvNextConfig


class ConvNext(ImageTower):
    """The image tower. Its pooler is a normalisation of the mean over all positions."""

    config: Config

    poolings = ("pooler", "mean")

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Encode pixels that the image processor has normalised; images may have any size.

        The last hidden state has the positions of the last map, not normalised. Unless `deterministic`, drop
        path leaves out blocks of some examples, with the rng 'dropout'.
        """
        x_BxLxD = self.encode(pixel_values_BxHxWxC, deterministic)
        pooled_BxD = x_BxLxD.mean(1)
        if self.pooling == "pooler":
            norm = LayerNorm(self.config.layer_norm_eps, self.dtype, name="layernorm")
            pooled_BxD = norm(pooled_BxD)
        return TowerOutput(x_BxLxD, pooled_BxD)

    def encode(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        """Return the positions of the last map, not normalised."""
        cfg = self.config
        x_BxYxXxC = ConvNextStem(cfg, self.dtype, name="embeddings")(pixel_values_BxHxWxC)
        encoder = ConvNextStages(cfg, self.dtype, self.remat, self.cuts, name="encoder")
        return positions(encoder(x_BxYxXxC, deterministic))


class Dinov3ConvNext(ConvNext):
    """The image tower of DINOv3. Its tokens begin with one for the whole image, as in DINOv3's ViT."""

    poolings = ("pooler", "cls", "mean")

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Encode pixels that the image processor has normalised; images may have any size.

        The last hidden state has the mean over all positions of the last map and then these positions, each
        normalised. The poolings 'pooler' and 'cls' take the normalised mean. Unless `deterministic`, drop
        path leaves out blocks of some examples, with the rng 'dropout'.
        """
        x_BxLxD = self.encode(pixel_values_BxHxWxC, deterministic)
        x_BxLxD = jnp.concatenate([x_BxLxD.mean(1, keepdims=True), x_BxLxD], axis=1)
        x_BxLxD = LayerNorm(self.config.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)
        pooled_BxD = x_BxLxD[:, 1:].mean(1) if self.pooling == "mean" else x_BxLxD[:, 0]
        return TowerOutput(x_BxLxD, pooled_BxD)


class ConvNextStem(nn.Module):
    """The patch embeddings of an image, followed by a normalisation."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values_BxHxWxC: Float[Array, "B H W C"]) -> NewMap:
        cfg = self.config
        x_BxYxXxC = PatchEmbeddings(
            cfg.hidden_sizes[0],
            cfg.patch_size,
            cfg.num_channels,
            cfg.initializer_range,
            self.dtype,
            name="patch_embeddings",
        )(pixel_values_BxHxWxC)
        return LayerNorm(cfg.norm_epsilon, self.dtype, name="layernorm")(x_BxYxXxC)


class ConvNextStages(nn.Module):
    """The stages of equal blocks; every stage after the first begins by halving the resolution.

    If the collection 'intermediates' is mutable, it gets 'input' and the output of each stage and each block
    as 'hidden_state'.
    """

    config: Config
    dtype: Any
    remat: Remat = "none"
    cuts: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x_BxYxXxC: Map, deterministic: bool) -> NewMap:
        cfg = self.config
        self.sow("intermediates", "input", x_BxYxXxC)
        # The rate of drop path rises linearly over the blocks of all stages (1603.09382, section 3).
        rates = np.linspace(0, cfg.drop_path_rate, sum(cfg.depths), dtype=np.float32)
        rates_of_stage = np.split(rates, np.cumsum(cfg.depths[:-1]))
        # transformers builds `num_stages` stages, even if config.json describes more.
        for i, rates_N in enumerate(rates_of_stage[: cfg.num_stages]):
            cuts = cuts_under(f"encoder/stages_{i}", self.cuts)
            width, name = cfg.hidden_sizes[i], f"stages_{i}"
            stage = ConvNextStage(cfg, width, self.dtype, self.remat, cuts, name=name)
            x_BxYxXxC = stage(x_BxYxXxC, rates_N, deterministic, downsample=i > 0)
        return x_BxYxXxC


class ConvNextStage(nn.Module):
    """A scanned stack of equal blocks, after a convolution that halves the resolution."""

    config: Config
    width: int
    dtype: Any
    remat: Remat
    cuts: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x_BxYxXxC: Map, rates_N: np.ndarray, deterministic: bool, *, downsample: bool
    ) -> NewMap:
        cfg = self.config
        if downsample:
            norm = LayerNorm(cfg.norm_epsilon, self.dtype, name="downsampling_layer_0")
            # A 2x2 convolution with stride 2 is a patch embedding with patches of 2x2 positions.
            x_BxYxXxC = PatchEmbeddings(
                self.width,
                2,
                x_BxYxXxC.shape[-1],
                cfg.initializer_range,
                self.dtype,
                name="downsampling_layer_1",
            )(norm(x_BxYxXxC))
        make_block = functools.partial(ConvNextBlock, cfg, self.width, self.dtype)
        x_BxYxXxC = scan_blocks(
            make_block, x_BxYxXxC, rates_N, deterministic, self.remat, cuts=self.cuts
        )
        self.sow("intermediates", "hidden_state", x_BxYxXxC)
        return x_BxYxXxC


class ConvNextBlock(nn.Module):
    """A depthwise convolution, followed by an MLP at each position (2201.03545, figure 4)."""

    config: Config
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxYxXxC: Map, rate: Float[Array, ""], deterministic: bool) -> Map:
        cfg, std, dtype = self.config, self.config.initializer_range, self.dtype
        border = (_KERNEL_SIZE // 2, _KERNEL_SIZE // 2)
        # The MLP works on a sequence of positions, where LayerNorm and dense layers need no map.
        h_BxLxC = positions(
            DepthwiseConv(_KERNEL_SIZE, 1, border, std, dtype, use_bias=True, name="dwconv")(
                x_BxYxXxC
            )
        )
        h_BxLxC = LayerNorm(cfg.norm_epsilon, dtype, name="layernorm")(h_BxLxC)
        h_BxLxF = dense(4 * self.width, name="pwconv1", init_std=std, dtype=dtype)(h_BxLxC)
        h_BxLxF = activation(cfg.hidden_act)(h_BxLxF)
        if cfg.response_norm:
            h_BxLxF = GlobalResponseNorm(name="grn")(h_BxLxF)
        h_BxLxC = dense(self.width, name="pwconv2", init_std=std, dtype=dtype)(h_BxLxF)
        if cfg.layer_scale is not None:
            h_BxLxC = LayerScale(cfg.layer_scale, name="layer_scale")(h_BxLxC)
        if cfg.drop_path_rate and not deterministic:
            # Stochastic depth drops or keeps a whole row (1603.09382).
            row_shape = (len(h_BxLxC), 1, 1)
            h_BxLxC = drop(h_BxLxC, rate, self.make_rng("dropout"), row_shape)
        x_BxYxXxC = x_BxYxXxC + h_BxLxC.reshape(x_BxYxXxC.shape)
        self.sow("intermediates", "hidden_state", x_BxYxXxC)
        return x_BxYxXxC


class GlobalResponseNorm(nn.Module):
    """Global response normalisation, computed in float32 (2301.00808, section 3.2).

    Each feature is scaled by its L2 norm over all positions, relative to the mean norm of all features.
    """

    @nn.compact
    def __call__(self, x_BxLxF: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
        shape, zeros = (1, 1, 1, x_BxLxF.shape[-1]), nn.initializers.zeros
        weight_1x1xF, bias_1x1xF = (
            jnp.squeeze(self.param(name, zeros, shape), 0).astype(jnp.float32)
            for name in ("weight", "bias")
        )
        h_BxLxF = x_BxLxF.astype(jnp.float32)
        squared_Bx1xF = jnp.square(h_BxLxF).sum(1, keepdims=True)
        # The gradient of sqrt at 0 is infinite. The double `where` gives a feature that is 0 everywhere the
        # gradient 0, as torch's norm does.
        nonzero = squared_Bx1xF > 0
        length_Bx1xF = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squared_Bx1xF, 1.0)), 0.0)
        relative_Bx1xF = length_Bx1xF / (length_Bx1xF.mean(-1, keepdims=True) + 1e-6)
        h_BxLxF = weight_1x1xF * (h_BxLxF * relative_Bx1xF) + bias_1x1xF + h_BxLxF
        return h_BxLxF.astype(x_BxLxF.dtype)
