"""The Vision Transformer (https://arxiv.org/abs/2010.11929) and DeiT (https://arxiv.org/abs/2012.12877),
numerically Hugging Face's ViTModel and DeiTModel.

Dims: B batch, HxW pixels, C channels, YxX patches, L = 1 + Y * X tokens (DeiT: 2 + Y * X), D width,
P pooled width.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from lit_jax.models.layers import DenseAct, LayerNorm
from lit_jax.models.patches import Embeddings, EmbeddingsConfig, Size
from lit_jax.models.tower import ImageTower, TowerOutput
from lit_jax.models.transformer import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "vit"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: Size = 224  # pixels; a pair is (height, width)
    patch_size: Size = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"

    @property
    def embeddings(self) -> EmbeddingsConfig:
        return EmbeddingsConfig(
            width=self.hidden_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            init_std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
        )

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            without_bias=() if self.qkv_bias else ("query", "key", "value"),
            attention_dropout=self.attention_probs_dropout_prob,
            output_dropout=self.hidden_dropout_prob,
            mlp_dropout=self.hidden_dropout_prob,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeiTConfig(ViTConfig):
    model_type: str = "deit"

    @property
    def embeddings(self) -> EmbeddingsConfig:
        return dataclasses.replace(super().embeddings, tokens=("cls_token", "distillation_token"))


class ViT(ImageTower):
    """The image tower. Its pooler is a trained head on the CLS token, after the last normalisation."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], *, deterministic: bool = True
    ) -> TowerOutput:
        """Pixels, normalised by the image processor, to tokens and a pooled vector.

        Images of another size than the config's are encoded with interpolated position embeddings.
        Not `deterministic`: dropout, with the rng 'dropout'.
        """
        cfg = self.config
        x_BxLxD = Embeddings(cfg.embeddings, self.dtype, name="embeddings")(
            pixel_values_BxHxWxC, deterministic
        )
        x_BxLxD = self.encoder(cfg.block)(x_BxLxD, None, deterministic)
        x_BxLxD = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layernorm")(x_BxLxD)
        if self.pooling == "pooler":
            pooled_BxP = DenseAct(
                cfg.pooler_output_size or cfg.hidden_size,
                cfg.pooler_act,
                cfg.initializer_range,
                self.dtype,
                name="pooler",
            )(x_BxLxD[:, 0])
        elif self.pooling == "cls":
            pooled_BxP = x_BxLxD[:, 0]
        else:
            pooled_BxP = x_BxLxD[:, cfg.embeddings.leading :].mean(1)
        return TowerOutput(x_BxLxD, pooled_BxP)
