"""DINOv2 (https://arxiv.org/abs/2304.07193), also with registers (https://arxiv.org/abs/2309.16588).

Numerically they are Hugging Face's Dinov2Model and Dinov2WithRegistersModel.
"""

import dataclasses

from lit_jax.models.patches import ImageEmbeddingConfig, Size
from lit_jax.models.tower import ImageTransformer, ViTFields
from lit_jax.models.transformer import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Fields(ViTFields):
    """The fields that both versions share."""

    layer_norm_eps: float = 1e-6
    mlp_ratio: int | float = 4
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    # The gated MLP has silu, whatever hidden_act says.
    use_swiglu_ffn: bool = False

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        return dataclasses.replace(super().embeddings, mask_token=(1, self.hidden_size))

    @property
    def mlp_width(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio)
        # A gated MLP has three matrices instead of two. Two thirds of the width, rounded up to a multiple of
        # 8, keep the number of parameters (2002.05202, section 2).
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def block(self) -> BlockConfig:
        return dataclasses.replace(
            super().block,
            activation="silu" if self.use_swiglu_ffn else self.hidden_act,
            without_bias=() if self.qkv_bias else ("query", "key", "value"),
            gated_mlp=self.use_swiglu_ffn,
            # hidden_dropout_prob applies to the embeddings alone.
            output_dropout=0.0,
            mlp_dropout=0.0,
            layer_scale=self.layerscale_value,
            drop_path=self.drop_path_rate,
            # Hugging Face gives all blocks of DINOv2 the same rate.
            drop_path_rises=False,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config(Dinov2Fields):
    """The fields of DINOv2."""

    model_type: str = "dinov2"
    patch_size: Size = 14
    use_mask_token: bool = True

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        embeddings = super().embeddings
        # Files of the family have the token only if the config says so.
        mask_token = embeddings.mask_token if self.use_mask_token else None
        return dataclasses.replace(embeddings, mask_token=mask_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2WithRegistersConfig(Dinov2Fields):
    """The fields of DINOv2 with registers, whose positions are interpolated with antialiasing."""

    model_type: str = "dinov2_with_registers"
    num_register_tokens: int = 4

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        return dataclasses.replace(
            super().embeddings, registers=self.num_register_tokens, antialias=True
        )


class Dinov2(ImageTransformer):
    """The image tower. Without a pooler, its pooled output is the CLS token."""

    config: Dinov2Fields
