"""DINOv2 (https://arxiv.org/abs/2304.07193), also with registers (https://arxiv.org/abs/2309.16588),
numerically Hugging Face's Dinov2Model and Dinov2WithRegistersModel.

Dims: B batch, HxW pixels, C channels, L tokens, D width.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from lit_jax.models.layers import LayerNorm
from lit_jax.models.patches import (
    Embeddings,
    EmbeddingsConfig,
    Matrix,
    Size,
    patch_grid,
)
from lit_jax.models.tower import ImageTower, TowerOutput
from lit_jax.models.transformer import BlockConfig, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int | float = 4
    hidden_act: str = "gelu"  # not of use_swiglu_ffn
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: Size = 224  # pixels; a pair is (height, width)
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    patch_size: Size

    @property
    def embeddings(self) -> EmbeddingsConfig:
        return EmbeddingsConfig(
            width=self.hidden_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            init_std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
            mask_token=(1, self.hidden_size),
        )

    @property
    def block(self) -> BlockConfig:
        mlp_width = int(self.hidden_size * self.mlp_ratio)
        if self.use_swiglu_ffn:  # two thirds, to the next multiple of 8
            mlp_width = (int(mlp_width * 2 / 3) + 7) // 8 * 8
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=mlp_width,
            activation="silu" if self.use_swiglu_ffn else self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            without_bias=() if self.qkv_bias else ("query", "key", "value"),
            gated_mlp=self.use_swiglu_ffn,
            attention_dropout=self.attention_probs_dropout_prob,
            layer_scale=self.layerscale_value,
            drop_path=self.drop_path_rate,
            drop_path_rises=False,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config(_Config):
    model_type: str = "dinov2"
    patch_size: Size = 14
    use_mask_token: bool = True

    @property
    def embeddings(self) -> EmbeddingsConfig:
        embeddings = super().embeddings
        return (
            embeddings if self.use_mask_token else dataclasses.replace(embeddings, mask_token=None)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2WithRegistersConfig(_Config):
    model_type: str = "dinov2_with_registers"
    patch_size: Size = 16
    num_register_tokens: int = 4

    @property
    def embeddings(self) -> EmbeddingsConfig:
        return dataclasses.replace(
            super().embeddings, registers=self.num_register_tokens, antialias=True
        )


class Dinov2(ImageTower):
    """The image tower. It has no pooler: its pooled output is the CLS token."""

    config: _Config

    @property
    def position_matrix(self) -> Matrix:
        """What position embeddings are interpolated by."""
        return self.config.embeddings.matrix

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated position embeddings.
        Not `deterministic`: dropout and drop path, with the rng 'dropout'.
        """
        cfg = self.config
        x_BxLxD = Embeddings(cfg.embeddings, self.dtype, name="embeddings")(
            pixel_values_BxHxWxC, deterministic
        )
        _, height, width, _ = pixel_values_BxHxWxC.shape
        rotary = self._rotary(patch_grid((height, width), cfg.patch_size), deterministic)
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, None, deterministic, rotary)
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)
        if self.pooling == "mean":
            return TowerOutput(x_BxLxD, x_BxLxD[:, cfg.embeddings.leading :].mean(1))
        return TowerOutput(x_BxLxD, x_BxLxD[:, 0])

    def _rotary(self, grid: tuple[int, int], deterministic: bool) -> Rotary | None:
        """The positions that are not in the embeddings: none."""
        return None
