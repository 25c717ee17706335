"""DINOv3's vision transformer (https://arxiv.org/abs/2508.10104), numerically Hugging Face's DINOv3ViTModel.

Dims: B batch, L tokens, N patches, K width of a head, I = K / 4.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lit_jax.errors import UserError
from lit_jax.models.patches import ImageEmbeddingConfig, Size
from lit_jax.models.tower import ImageTransformer
from lit_jax.models.transformer import BlockConfig, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov3Config:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "dinov3_vit"
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    # Pixels; a pair is (height, width).
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    num_register_tokens: int = 0
    rope_theta: float = 100.0
    # In training the coordinates of the patches change at random, alike for all images of a batch. `shift`
    # bounds the offset along each axis.
    pos_embed_shift: float | None = None
    # `jitter` bounds a factor for each axis, `rescale` a factor for both axes together.
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0

    @property
    def embeddings(self) -> ImageEmbeddingConfig:
        """The description of the image embeddings."""
        return ImageEmbeddingConfig(
            width=self.hidden_size,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            init_std=self.initializer_range,
            registers=self.num_register_tokens,
            positions=False,
            mask_token=(1, 1, self.hidden_size),
        )

    @property
    def block(self) -> BlockConfig:
        """The description of the blocks."""
        biases = {
            "query": self.query_bias,
            "key": self.key_bias,
            "value": self.value_bias,
            "output": self.proj_bias,
            # The names of both forms of the MLP are listed; a block has only one form.
            **dict.fromkeys(("gate", "up", "down", "fc1", "fc2"), self.mlp_bias),
        }
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            norm_epsilon=self.layer_norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            without_bias=tuple(name for name, has_bias in biases.items() if not has_bias),
            gated_mlp=self.use_gated_mlp,
            attention_dropout=self.attention_dropout,
            layer_scale=self.layerscale_value,
            drop_path=self.drop_path_rate,
            drop_path_rises=False,
        )


class Dinov3(ImageTransformer):
    """The image tower. Its positions are angles in the attention, and its pooler is the CLS token."""

    config: Dinov3Config

    def rotary(self, grid: tuple[int, int], deterministic: bool) -> Rotary:
        cfg = self.config
        head_width = cfg.hidden_size // cfg.num_attention_heads
        # The two coordinates share a head, and each frequency of a coordinate takes a pair of features.
        if head_width % 4:
            raise UserError(
                f"The model's config.json has hidden_size {cfg.hidden_size} with num_attention_heads "
                f"{cfg.num_attention_heads}, but DINOv3 needs a multiple of 4 for each head; correct it."
            )
        coordinates_Nx2 = centres(grid)
        if not deterministic:
            coordinates_Nx2 = self._moved(coordinates_Nx2)
        # The wave lengths run from 1 to rope_theta, in units of half the image, and do not depend on its
        # resolution.
        frequency_I = cfg.rope_theta ** -np.arange(0, 1, 4 / head_width)
        angle_Nx2xI = 2 * np.pi * coordinates_Nx2[:, :, None] * jnp.float32(frequency_I)[None, None]
        # The row's angles come first, then the column's. The tile gives both halves of a head the same
        # angles.
        angle_NxK = jnp.tile(angle_Nx2xI.reshape(len(coordinates_Nx2), -1), (1, 2))
        # CLS and register tokens have no position. An angle of 0 leaves them as they are.
        angle_LxK = jnp.pad(angle_NxK, ((cfg.embeddings.leading, 0), (0, 0)))
        return Rotary(jnp.cos(angle_LxK), jnp.sin(angle_LxK))

    def _moved(self, coordinates_Nx2: Float[Array, "N 2"]) -> Float[Array, "N 2"]:
        """Return coordinates shifted and scaled at random, alike for all images of a batch."""

        def uniform(bound: float, shape: tuple[int, int]) -> Array:
            return jax.random.uniform(self.make_rng("dropout"), shape, minval=-bound, maxval=bound)

        cfg = self.config
        if cfg.pos_embed_shift is not None:
            coordinates_Nx2 += uniform(cfg.pos_embed_shift, (1, 2))
        if cfg.pos_embed_jitter is not None:
            # The logarithm is uniform, so a factor is as likely as its inverse.
            coordinates_Nx2 *= jnp.exp(uniform(math.log(cfg.pos_embed_jitter), (1, 2)))
        if cfg.pos_embed_rescale is not None:
            coordinates_Nx2 *= jnp.exp(uniform(math.log(cfg.pos_embed_rescale), (1, 1)))
        return coordinates_Nx2


def centres(grid: tuple[int, int]) -> Float[Array, "N 2"]:
    """Return the (row, column) centre of each patch, where the image spans -1 to 1 along both axes."""
    axes = [(2 * np.arange(size) + 1) / size - 1 for size in grid]
    return jnp.stack(jnp.meshgrid(*map(jnp.float32, axes), indexing="ij"), -1).reshape(-1, 2)
