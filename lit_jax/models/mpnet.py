"""MPNet (https://arxiv.org/abs/2004.09297), numerically Hugging Face's MPNetModel.

MPNet is a BERT without token types. MPNet counts positions as RoBERTa does, and adds a learned number for
each distance between two tokens to the attention logits, the same in all blocks.

Dims: B batch, L tokens, H heads.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lit_jax.errors import UserError
from lit_jax.models.bert import (
    Bert,
    PlainConfig,
    PositionIds,
    counted_from,
)
from lit_jax.models.token_embeddings import TokenEmbeddingConfig

# Hugging Face's code fixes these three numbers, whatever config.json says.
_PADDING_ID = 1
_BUCKETS = 32
_FARTHEST = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(PlainConfig):
    """The fields of MPNet. `position_ids` is a field of lit_jax alone; see `bert.CountedPositionsConfig`."""

    model_type: str = "mpnet"
    vocab_size: int = 30527
    # The number of rows of the table. Only the first 32 are used.
    relative_attention_num_buckets: int = 32
    position_ids: PositionIds = "input_ids"

    @property
    def padding_id(self) -> int:
        """The id that positions are counted from."""
        return _PADDING_ID

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        padding_id = counted_from(self.position_ids, self.padding_id)
        return dataclasses.replace(super().embedding, padding_id=padding_id)


class MPNet(Bert):
    """The text tower. Its pooler is a dense layer with tanh on the first token."""

    config: MPNetConfig

    def attention_bias(self, attended_BxL: Bool[Array, "B L"]) -> Float[Array, "B H L L"]:
        cfg, length = self.config, attended_BxL.shape[1]
        if cfg.relative_attention_num_buckets < _BUCKETS:
            raise UserError(
                "The model's config.json has relative_attention_num_buckets="
                f"{cfg.relative_attention_num_buckets}, but MPNet needs at least {_BUCKETS}; correct it."
            )
        # The table is a parameter of the tower, because all blocks share it.
        table = nn.Embed(
            cfg.relative_attention_num_buckets,
            cfg.num_attention_heads,
            embedding_init=nn.initializers.normal(cfg.initializer_range),
            name="relative_attention_bias",
        )
        # The buckets depend on the length alone, so NumPy computes them once, when the function is traced.
        learned_LxLxH = table(distance_buckets(length)).astype(jnp.float32)
        return super().attention_bias(attended_BxL) + learned_LxLxH.transpose(2, 0, 1)[None]


@functools.cache
def distance_buckets(length: int) -> np.ndarray:
    """Return the row of the table for query token q (first axis) and key token s, int (length, length).

    The buckets are T5's (1910.10683, section 2.1). Half of the rows are for keys before q, half for keys
    after q. In each half, the first rows are for one distance each; the others are for ranges whose length
    grows exponentially, up to `_FARTHEST`.
    """
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    ahead_LxL = np.arange(length)[None] - np.arange(length)[:, None]
    distance_LxL = np.abs(ahead_LxL)
    # The logarithm is float32 as in transformers. Ranges begin exactly at 16, 32 and 64, so its rounding
    # decides the bucket of these distances.
    ratio_LxL = np.maximum(distance_LxL, 1).astype(np.float32) / np.float32(exact)
    share_LxL = np.log(ratio_LxL) / np.float32(np.log(_FARTHEST / exact))
    range_LxL = exact + (share_LxL * np.float32(half - exact)).astype(int)
    bucket_LxL = np.where(distance_LxL < exact, distance_LxL, np.minimum(range_LxL, half - 1))
    # Rows of keys after q follow those of keys before q.
    return bucket_LxL + half * (ahead_LxL > 0)
