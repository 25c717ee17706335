"""The Vision Transformer (https://arxiv.org/abs/2010.11929) and DeiT (https://arxiv.org/abs/2012.12877),
numerically Hugging Face's ViTModel and DeiTModel.

Dims: B batch, HxW pixels, C channels, YxX patches, L = 1 + Y * X tokens (DeiT: 2 + Y * X), D width,
P pooled width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.distributed.mesh import shard_batch
from lit_jax.models.layers import DenseAct, LayerNorm, Tower, TowerOutput
from lit_jax.models.patches import PatchEmbeddings, Size, pair, patch_grid, resize_positions
from lit_jax.models.transformer import BlockConfig, Encoder


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
    def special_tokens(self) -> tuple[str, ...]:
        """The trained tokens in front of the patches."""
        return ("cls_token",)

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
    def special_tokens(self) -> tuple[str, ...]:
        return ("cls_token", "distillation_token")


class ViT(Tower):
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
        x_BxLxD = Embeddings(cfg, self.dtype, name="embeddings")(
            pixel_values_BxHxWxC, deterministic
        )
        x_BxLxD = Encoder(cfg.block, self.dtype, name="encoder")(x_BxLxD, None, deterministic)
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
            pooled_BxP = x_BxLxD[:, len(cfg.special_tokens) :].mean(1)
        return TowerOutput(x_BxLxD, pooled_BxP)

    @property
    def example_input(self) -> jax.ShapeDtypeStruct:
        shape = (1, *pair(self.config.image_size), self.config.num_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


class Embeddings(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, pixel_values_BxHxWxC: Float[Array, "B H W C"], deterministic: bool
    ) -> Float[Array, "B L D"]:
        cfg, init = self.config, nn.initializers.normal(self.config.initializer_range)
        patches_BxYxXxD = PatchEmbeddings(
            cfg.hidden_size,
            cfg.patch_size,
            cfg.num_channels,
            cfg.initializer_range,
            self.dtype,
            name="patch_embeddings",
        )(pixel_values_BxHxWxC)
        batch, rows, columns, width = patches_BxYxXxD.shape
        special = [self.param(name, init, (1, 1, width)) for name in cfg.special_tokens]
        own_grid = patch_grid(cfg.image_size, cfg.patch_size)
        length = len(special) + own_grid[0] * own_grid[1]
        positions_1xLxD = self.param("position_embeddings", init, (1, length, width))
        x_BxLxD = jnp.concatenate(
            [
                *(
                    jnp.broadcast_to(token_1x1xD.astype(self.dtype), (batch, 1, width))
                    for token_1x1xD in special
                ),
                patches_BxYxXxD.reshape(batch, -1, width),
            ],
            axis=1,
        )
        positions_LxD = resize_positions(jnp.squeeze(positions_1xLxD, 0), own_grid, (rows, columns))
        x_BxLxD = x_BxLxD + positions_LxD[None].astype(self.dtype)
        x_BxLxD = nn.Dropout(cfg.hidden_dropout_prob)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)
