"""The embeddings of texts: token ids to tokens.

Dims: B batch, L tokens, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import Dropout, LayerNorm, broadcast_float32, normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEmbeddingConfig:
    """The description of the tables in which tokens are looked up, and of the normalisation of their sum.

    The fields that end in `_name` are names of parameters. None means that the family has no such table, or
    no normalisation.
    """

    width: int
    vocab_size: int
    max_positions: int
    init_std: float
    # The cutoff of the normal distribution, in standard deviations.
    init_cutoff: float | None = None
    dropout: float = 0.0
    token_types: int = 0
    # If set, positions count the tokens other than this one, from its id + 1. None counts all tokens from 0.
    padding_id: int | None = None
    # The sinusoids are initial values; the position embeddings train like others.
    sinusoidal: bool = False
    word_name: str = "word_embeddings"
    position_name: str | None = "position_embeddings"
    norm_name: str | None = "LayerNorm"
    norm_epsilon: float = 1e-12
    norm_bias: bool = True

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each table, by the name of the input that indexes the table."""
        sizes = {"input_ids": self.vocab_size}
        if self.position_name is not None:
            sizes["position_ids"] = self.max_positions
        if self.token_types:
            sizes["token_type_ids"] = self.token_types
        return sizes

    @property
    def max_length(self) -> int:
        """The largest number of tokens that a text may have."""
        return self.max_positions - (0 if self.padding_id is None else self.padding_id + 1)


class TokenEmbeddings(nn.Module):
    """The sum of the embeddings of words, token types and positions, normalised if the family does so."""

    config: TokenEmbeddingConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        input_ids_BxL: Int[Array, "B L"],
        token_type_ids_BxL: Int[Array, "B L"] | None,
        position_ids_BxL: Int[Array, "#B L"],
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        init = normal(cfg.init_std, cfg.init_cutoff)

        # The rows are cast after the look-up, so that the gradient of a table adds up in float32.
        # `broadcast_float32` also broadcasts positions that all texts share.
        def embed(name: str, size: int, ids_BxL: Array, init: Any = init) -> Array:
            rows = nn.Embed(size, cfg.width, embedding_init=init, name=name)(ids_BxL)
            return broadcast_float32(rows, (*input_ids_BxL.shape, cfg.width), self.dtype)

        x_BxLxD = embed(cfg.word_name, cfg.vocab_size, input_ids_BxL)
        if cfg.token_types:
            # Type 0 is not the absence of a type: its embedding is added, too.
            if token_type_ids_BxL is None:
                token_type_ids_BxL = jnp.zeros_like(input_ids_BxL)
            x_BxLxD += embed("token_type_embeddings", cfg.token_types, token_type_ids_BxL)
        if cfg.position_name is not None:
            init = _sinusoids if cfg.sinusoidal else init
            x_BxLxD += embed(cfg.position_name, cfg.max_positions, position_ids_BxL, init)
        if cfg.norm_name is not None:
            norm = LayerNorm(cfg.norm_epsilon, self.dtype, cfg.norm_bias, name=cfg.norm_name)
            x_BxLxD = norm(x_BxLxD)
        x_BxLxD = Dropout(cfg.dropout)(x_BxLxD, deterministic=deterministic)
        return shard_batch(x_BxLxD)


def check_length(length: int, max_length: int) -> None:
    """Raise UserError for texts that are longer than a tower's config allows."""
    if length > max_length:
        raise UserError(
            f"The texts are {length} tokens long, but the text tower has positions for only {max_length}; "
            "make the texts shorter (config.data.max_text_length)."
        )


def token_positions(input_ids_BxL: Int[Array, "B L"], padding_id: int | None) -> Int[Array, "#B L"]:
    """Return the positions that `TokenEmbeddingConfig.padding_id` describes, int32.

    Padding tokens get the position `padding_id`. The token's id decides, not the attention mask, because
    fairseq, where RoBERTa comes from, has no mask.
    """
    # One row of positions serves all texts.
    if padding_id is None:
        return jnp.arange(input_ids_BxL.shape[1])[None]
    # The count stands still at padding, and the product moves padding back to `padding_id`.
    counts_BxL = (input_ids_BxL != padding_id).astype(jnp.int32)
    return jnp.cumsum(counts_BxL, axis=1) * counts_BxL + padding_id


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Return the sinusoidal position embeddings of https://arxiv.org/abs/1706.03762, section 3.5."""
    del key
    length, width = shape
    # Features 2i and 2i + 1 are sine and cosine of one frequency.
    pairs_D = np.arange(width) // 2
    angle_LxD = np.arange(length)[:, None] / 10000 ** (2 * pairs_D / width)
    even_D = np.arange(width) % 2 == 0
    return jnp.asarray(np.where(even_D, np.sin(angle_LxD), np.cos(angle_LxD)), dtype)
