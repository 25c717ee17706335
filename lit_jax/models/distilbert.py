"""DistilBERT (https://arxiv.org/abs/1910.01108), numerically Hugging Face's DistilBertModel.

DistilBERT is a BERT without token types and without a pooler. Its config.json has other field names.
"""

import dataclasses
from typing import ClassVar

from lit_jax.config import Pooling
from lit_jax.models.bert import Bert
from lit_jax.models.token_embeddings import TokenEmbeddingConfig
from lit_jax.models.transformer import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig:
    """The fields of config.json that change a number; names and defaults are Hugging Face's."""

    model_type: str = "distilbert"
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    # The sinusoids are initial values; the position embeddings train like others.
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    # The width inside the MLP.
    hidden_dim: int = 4 * 768
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02

    @property
    def block(self) -> BlockConfig:
        """The description of the blocks."""
        return BlockConfig(
            depth=self.n_layers,
            width=self.dim,
            num_heads=self.n_heads,
            mlp_width=self.hidden_dim,
            activation=self.activation,
            # Hugging Face's code has this number; config.json has no field for it.
            norm_epsilon=1e-12,
            norm_first=False,
            init_std=self.initializer_range,
            attention_dropout=self.attention_dropout,
            # Unlike BERT, DistilBERT has no dropout after the attention's output.
            output_dropout=0.0,
            mlp_dropout=self.dropout,
        )

    @property
    def embedding(self) -> TokenEmbeddingConfig:
        """The description of the token embeddings."""
        return TokenEmbeddingConfig(
            width=self.dim,
            vocab_size=self.vocab_size,
            max_positions=self.max_position_embeddings,
            init_std=self.initializer_range,
            dropout=self.dropout,
            sinusoidal=self.sinusoidal_pos_embds,
        )


class DistilBert(Bert):
    """The text tower. The family has no pooler."""

    config: DistilBertConfig

    poolings: ClassVar[tuple[Pooling, ...]] = ("cls", "mean")
