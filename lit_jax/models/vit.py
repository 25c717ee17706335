"""The Vision Transformer (https://arxiv.org/abs/2010.11929) and DeiT (https://arxiv.org/abs/2012.12877).

Numerically they are Hugging Face's ViTModel and DeiTModel.

Dims: B batch, L = 1 + patches (DeiT: 2 + patches), D width, P pooled width.
"""

import dataclasses

from jaxtyping import Array, Float

from lit_jax.models.layers import DenseAct
from lit_jax.models.patches import ImageEmbeddingConfig
from lit_jax.models.tower import ImageTransformer, ViTFields
from lit_jax.models.transformer import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ViTFields):
    """The fields of ViT's config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "vit"
    intermediate_size: int = 3072
    qkv_bias: bool = True
    # None means hidden_size.
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def block(self) -> BlockConfig:
        without_bias = () if self.qkv_bias else ("query", "key", "value")
        return dataclasses.replace(super().block, without_bias=without_bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeiTConfig(ViTConfig):
    """The fields of DeiT's config.json, which are those of ViT. DeiT has a distillation token after CLS."""

    model_type: str = "deit"

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        return dataclasses.replace(super().embeddings, tokens=("cls_token", "distillation_token"))


class ViT(ImageTransformer):
    """The image tower. Its pooler is a trained head on the CLS token, after the last normalisation."""

    config: ViTConfig

    def pooler(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B P"]:
        cfg = self.config
        width = cfg.pooler_output_size or cfg.hidden_size
        # Hugging Face's pooler is BERT's; the paper's classification head is not part of the tower.
        head = DenseAct(width, cfg.pooler_act, cfg.initializer_range, self.dtype, name="pooler")
        return head(x_BxLxD[:, 0])
