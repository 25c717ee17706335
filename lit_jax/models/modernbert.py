"""ModernBERT (https://arxiv.org/abs/2412.13663), numerically Hugging Face's ModernBertModel.

ModernBERT has rotary positions, a gated MLP, and blocks of two types: local and global attention.

Dims: B batch, L tokens (Q as queries), D width, K width of a head, I = K / 2 pairs of features, N blocks in
the scan, T types of block (local and global).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lit_jax.config import Pooling
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attention_bias
from lit_jax.models.layers import LayerNorm, rematerialized
from lit_jax.models.token_embeddings import TokenEmbeddingConfig
from lit_jax.models.tower import TextTransformer
from lit_jax.models.transformer import Block, BlockConfig, Rotary, TokenSelector

# The types of block in config.json, and the base of the rotary frequencies of each type (2104.09864). The
# order is the index T of the biases and angles below.
_THETAS = {"sliding_attention": 10_000.0, "full_attention": 160_000.0}
_LAYER_TYPES = tuple(_THETAS)

# A hashable dict.
Pairs = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "modernbert"
    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    # None means that the first of every three blocks is global.
    layer_types: tuple[str, ...] | None = None
    # The parameters of each type of block.
    rope_parameters: Pairs | None = None
    # The number of tokens in the window of local attention, half of them on each side.
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0

    @property
    def block(self) -> BlockConfig:
        """The description of the blocks."""
        biases = {
            ("query", "key", "value", "output"): self.attention_bias,
            ("gate", "up", "down"): self.mlp_bias,
            ("norm",): self.norm_bias,
        }
        # The layers that write to the residual stream start smaller, so that its variance does not grow with
        # depth.
        output_std = self.initializer_range / (2 * self.num_hidden_layers) ** 0.5
        return BlockConfig(
            depth=self.num_hidden_layers,
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_activation,
            norm_epsilon=self.norm_eps,
            norm_first=True,
            init_std=self.initializer_range,
            own_init_std=(("output", output_std), ("down", output_std)),
            init_cutoff=self.initializer_cutoff_factor,
            without_bias=sum((names for names, has in biases.items() if not has), ()),
            gated_mlp=True,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.mlp_dropout,
            output_dropout=self.attention_dropout,
        )

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        """The description of the token embeddings."""
        return TokenEmbeddingConfig(
            width=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            init_std=self.initializer_range,
            init_cutoff=self.initializer_cutoff_factor,
            word_name="tok_embeddings",
            # Positions enter the attention alone, as angles.
            position_name=None,
            norm_name="norm",
            norm_epsilon=self.norm_eps,
            norm_bias=self.norm_bias,
            dropout=self.embedding_dropout,
        )

    @property
    def type_indices(self) -> tuple[int, ...]:
        """The index in `_LAYER_TYPES` of each block's type. Raises UserError for unknown or missing types."""
        depth = self.num_hidden_layers
        types = self.layer_types or [
            # Every third block is global (2412.13663, section 2.1.2).
            "sliding_attention" if i % 3 else "full_attention"
            for i in range(depth)
        ]
        if len(types) != depth or not set(types) <= set(_LAYER_TYPES):
            raise UserError(
                f"The text tower's config has layer_types={list(types)}, where each of its {depth} blocks "
                f"needs one of {' and '.join(_LAYER_TYPES)}; correct it."
            )
        return tuple(_LAYER_TYPES.index(layer_type) for layer_type in types)

    @property
    def thetas(self) -> tuple[float, ...]:
        """The base of the frequencies of each type. Raises UserError if `rope_type` is not 'default'."""
        given = dict(self.rope_parameters or ())
        thetas = []
        for layer_type, default in _THETAS.items():
            parameters = dict(given.get(layer_type) or ())
            rope_type = parameters.get("rope_type", "default")
            if rope_type != "default":
                raise UserError(
                    f"The text tower's config has rope_type={rope_type!r}, which lit_jax does not "
                    "implement; choose a model with rope_type='default'."
                )
            thetas.append(parameters.get("rope_theta", default))
        return tuple(thetas)


class ModernBert(TextTransformer):
    """The text tower. The family has no pooler."""

    config: ModernBertConfig

    poolings: ClassVar[tuple[Pooling, ...]] = ("cls", "mean")

    def encode(
        self,
        x_BxLxD: Float[Array, "B L D"],
        attended_BxL: Bool[Array, "B L"],
        position_ids_BxL: Int[Array, "#B L"],
        select: TokenSelector,
        deterministic: bool,
    ) -> Array:
        """Return the tokens of the last block.

        The first block has parameters of its own, and the others are in a scan. If the collection
        'intermediates' is mutable, it gets 'input' and the records of the blocks, as in `Encoder`.
        """
        self.sow("intermediates", "input", x_BxLxD)
        cfg = self.config
        bias, rotary = _bias(cfg, attended_BxL), _rotary(cfg, position_ids_BxL)
        layer_type, *other_types = cfg.type_indices
        # The embeddings have already normalised the tokens of the first block. Without that normalisation the
        # block has fewer parameters than the others, so it cannot be in their scan.
        first_config = dataclasses.replace(cfg.block, norm_attention=False)
        first = Block(first_config, self.dtype, name="layer_0")
        # The type of the first block is static, so its bias and angles are selected here and not in a scan.
        own = jax.tree.map(lambda x: x[layer_type], (bias, rotary))

        def call(block: nn.Module, x_BxLxD: Array) -> Array:
            return block(x_BxLxD, *own, jnp.zeros(()), deterministic)

        x_BxLxD = rematerialized(call, self.remat, prevent_cse=True)(first, x_BxLxD)
        # The constraint on the first block matches that of `Encoder` on the others.
        x_BxLxD = shard_batch(x_BxLxD)
        if not other_types:
            return x_BxLxD
        encoder = self.encoder(dataclasses.replace(cfg.block, depth=len(other_types)), first=1)
        types_N = jnp.array(other_types)
        return encoder(x_BxLxD, bias, deterministic, rotary, types_N, select=select)

    def final_norm(self, x_BxLxD: Float[Array, "B Q D"]) -> Array:
        cfg = self.config
        return LayerNorm(cfg.norm_eps, self.dtype, cfg.norm_bias, name="final_norm")(x_BxLxD)


def _bias(cfg: ModernBertConfig, attended_BxL: Bool[Array, "B L"]) -> Float[Array, "T B 1 L L"]:
    """Return the bias of each type of block; local attention reaches `local_attention` // 2 to each side."""
    place_L = np.arange(attended_BxL.shape[1])
    near_LxL = np.abs(place_L[:, None] - place_L[None]) <= cfg.local_attention // 2
    everywhere_Bx1x1xL = attention_bias(attended_BxL)
    lowest = jnp.finfo(jnp.float32).min
    local_Bx1xLxL = jnp.where(near_LxL[None, None], everywhere_Bx1x1xL, lowest)
    # A scan selects one of the two by the block's type, so both need the same shape.
    return jnp.stack([local_Bx1xLxL, jnp.broadcast_to(everywhere_Bx1x1xL, local_Bx1xLxL.shape)])


def _rotary(cfg: ModernBertConfig, position_ids_BxL: Int[Array, "#B L"]) -> Rotary:
    """Return the angles of each type of block, TxBxLxK, float32 as in transformers."""
    head_width = cfg.hidden_size // cfg.num_attention_heads
    exponent_I = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    theta_Tx1 = np.array(cfg.thetas, np.float32)[:, None]
    frequency_TxI = 1 / theta_Tx1 ** exponent_I[None]
    position_1xBxLx1 = position_ids_BxL[None, ..., None].astype(jnp.float32)
    angle_TxBxLxI = position_1xBxLx1 * jnp.asarray(frequency_TxI)[:, None, None]
    # Features i and i + K/2 form a pair with one angle; see `transformer.Rotary`.
    angle_TxBxLxK = jnp.concatenate([angle_TxBxLxI, angle_TxBxLxI], axis=-1)
    return Rotary(jnp.cos(angle_TxBxLxK), jnp.sin(angle_TxBxLxK))
