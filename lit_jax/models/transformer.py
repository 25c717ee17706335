"""The transformer that all families share: blocks of attention and MLP, stacked and scanned.

A family file says with a `BlockConfig` what is particular to its blocks. The parameters of a block are
called alike in every family; lit_jax/weights/names.py knows what each family's files call them.

Dims: B batch, L tokens, D width, H heads, K width of a head, F width of the MLP, N depth.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.layers import LayerNorm, activation, attend, dense

Bias = Float[Array, "#B #H #L L"]
Tokens = Float[Array, "B L D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block; `depth` of them are an `Encoder`."""

    depth: int
    width: int
    num_heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    norm_first: bool  # as in ViT; else after the residual sum, as in BERT
    init_std: float = 0.02
    without_bias: tuple[str, ...] = ()  # of query, key, value, output, fc1, fc2
    gated_mlp: bool = False  # activation(gate(x)) * fc1(x) in the place of activation(fc1(x))
    attention_dropout: float = 0.0  # of the attention probabilities
    output_dropout: float = 0.0  # of what attention adds to the tokens
    mlp_dropout: float = 0.0  # of what the MLP adds to them
    layer_scale: float | None = None  # first value of a factor for each feature of what is added
    drop_path: float = (
        0.0  # probability that the last block adds nothing; rises from 0 at the first
    )


class Encoder(nn.Module):
    """The blocks as one scanned `layer`, whose parameters have a leading depth axis.

    Neither the time to compile nor the size of the program grows with depth. The collection
    'intermediates', where it is mutable, gets 'input' BxLxD, 'layer/hidden_state' NxBxLxD, the output of
    each block, and 'layer/attention/probability' NxBxHxLxL.
    """

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Tokens, bias: Bias | None, deterministic: bool) -> Tokens:
        """`bias` is added to the attention logits: 0 and float32's lowest number, or learned ones."""

        def step(block: nn.Module, x_BxLxD: Array, drop_path: Array) -> tuple[Array, None]:
            return shard_batch(block(x_BxLxD, bias, drop_path, deterministic)), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.depth,
        )
        self.sow("intermediates", "input", x_BxLxD)
        drop_path_N = jnp.linspace(0.0, self.config.drop_path, self.config.depth)
        return scan(Block(self.config, self.dtype, name="layer"), x_BxLxD, drop_path_N)[0]


class Block(nn.Module):
    """Attention, then an MLP; what each computes is added to the tokens."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        bias: Bias | None,
        drop_path: Float[Array, ""],
        deterministic: bool,
    ) -> Tokens:
        cfg = self.config
        attention = functools.partial(
            SelfAttention(cfg, self.dtype, name="attention"), bias=bias, deterministic=deterministic
        )
        mlp = Mlp(cfg, self.dtype, name="mlp")
        for part, name, dropout in (
            (attention, "attention", cfg.output_dropout),
            (mlp, "mlp", cfg.mlp_dropout),
        ):
            norm = LayerNorm(cfg.norm_epsilon, self.dtype, name=f"{name}_norm")
            h_BxLxD = part(norm(x_BxLxD) if cfg.norm_first else x_BxLxD)
            h_BxLxD = nn.Dropout(dropout)(h_BxLxD, deterministic=deterministic)
            if cfg.layer_scale is not None:
                h_BxLxD = LayerScale(cfg.layer_scale, name=f"{name}_scale")(h_BxLxD)
            if cfg.drop_path and not deterministic:
                h_BxLxD = _drop_path(h_BxLxD, drop_path, self.make_rng("dropout"))
            x_BxLxD = x_BxLxD + h_BxLxD
            if not cfg.norm_first:
                x_BxLxD = norm(x_BxLxD)
        self.sow("intermediates", "hidden_state", x_BxLxD)
        return x_BxLxD


def _drop_path(h_BxLxD: Tokens, rate: Float[Array, ""], key: jax.Array) -> Tokens:
    """Leaves out whole rows, and scales the others so that the mean stays (1603.09382)."""
    keep = 1 - rate.astype(jnp.float32)
    kept_Bx1x1 = jax.random.bernoulli(key, keep, (h_BxLxD.shape[0], 1, 1))
    return (jnp.where(kept_Bx1x1, h_BxLxD.astype(jnp.float32), 0.0) / keep).astype(h_BxLxD.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Tokens, *, bias: Bias | None, deterministic: bool) -> Tokens:
        cfg = self.config
        batch, length, _ = x_BxLxD.shape
        if cfg.width % cfg.num_heads:
            raise UserError(
                f"The model's config.json has hidden_size {cfg.width}, which is no multiple of its "
                f"num_attention_heads {cfg.num_heads}; correct it."
            )

        def heads(name: str) -> Array:
            y_BxLxD = _dense(cfg, cfg.width, name, self.dtype)(x_BxLxD)
            return y_BxLxD.reshape(batch, length, cfg.num_heads, -1).swapaxes(1, 2)

        def dropout(weights_BxHxLxL: Array) -> Array:
            # The weights are not divided by their sum yet; see `attend`.
            if self.is_mutable_collection("intermediates"):
                probability = weights_BxHxLxL / weights_BxHxLxL.sum(-1, keepdims=True)
                self.sow("intermediates", "probability", probability)
            return nn.Dropout(cfg.attention_dropout)(weights_BxHxLxL, deterministic=deterministic)

        context_BxHxLxK = attend(heads("query"), heads("key"), heads("value"), bias, dropout)
        context_BxLxD = context_BxHxLxK.swapaxes(1, 2).reshape(batch, length, cfg.width)
        return _dense(cfg, cfg.width, "output", self.dtype)(context_BxLxD)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or with a gate as in SwiGLU (2002.05202)."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Tokens) -> Tokens:
        cfg, act = self.config, activation(self.config.activation)
        h_BxLxF = _dense(cfg, cfg.mlp_width, "fc1", self.dtype)(x_BxLxD)
        if cfg.gated_mlp:
            h_BxLxF = act(_dense(cfg, cfg.mlp_width, "gate", self.dtype)(x_BxLxD)) * h_BxLxF
        else:
            h_BxLxF = act(h_BxLxF)
        return _dense(cfg, cfg.width, "fc2", self.dtype)(h_BxLxF)


class LayerScale(nn.Module):
    """A trained factor for each feature (2103.17239, section 2)."""

    first: float

    @nn.compact
    def __call__(self, x_BxLxD: Tokens) -> Tokens:
        factor_D = self.param("factor", nn.initializers.constant(self.first), x_BxLxD.shape[-1:])
        return x_BxLxD * factor_D.astype(x_BxLxD.dtype)[None, None]


def _dense(cfg: BlockConfig, features: int, name: str, dtype: Any) -> nn.Dense:
    return dense(
        features,
        name=name,
        init_std=cfg.init_std,
        dtype=dtype,
        use_bias=name not in cfg.without_bias,
    )
