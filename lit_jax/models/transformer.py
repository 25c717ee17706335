"""The transformer that all families share: blocks of attention and MLP, stacked and scanned.

A family file says with a `BlockConfig` what is particular to its blocks. The parameters of a block are
called alike in every family; lit_jax/weights/names.py knows what each family's files call them.

Dims: B batch, L tokens (Q as queries), D width, H heads, K width of a head, F width of the MLP, R rows of a
table of attention biases, T kinds of block, N depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lit_jax.config import Remat
from lit_jax.distributed.mesh import shard_batch
from lit_jax.errors import UserError
from lit_jax.models.attention import attend
from lit_jax.models.layers import (
    Dense,
    Dropout,
    LayerNorm,
    activation,
    dense,
    drop,
    rematerialized,
    scaled,
    stacks,
)

Bias = Float[Array, "#B #H #L L"]
BiasOfTable = Callable[[Float[Array, "R H"]], Bias]
BiasOfKinds = Float[Array, "T #B #H #L L"]
Tokens = Float[Array, "B L D"]
# How a transformer has its last block: scanned with the others; apart, with parameters of its own in the
# tree; or apart and computed for the pooled token alone.
LastBlock = Literal["scanned", "apart", "one token"]
Pick = Callable[[Array, int], Array]  # takes one token of each row along an axis, which stays


def first_token(x: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, 0, 1, axis=axis)


class Rotary(NamedTuple):
    """Where the tokens are, as angles (2104.09864); a token of angle 0 is without position."""

    cos: Float[Array, "*B L K"]  # float32; both halves of K alike
    sin: Float[Array, "*B L K"]


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
    own_init_std: tuple[tuple[str, float], ...] = ()  # of kernels for which it is another
    init_cutoff: float | None = None  # in standard deviations
    without_bias: tuple[str, ...] = ()  # of query, key, value, output, what an MLP has, and norm
    norm_attention: bool = True  # else attention reads the tokens as they are
    gated_mlp: bool = False  # down(activation(gate(x)) * up(x)), not fc2(activation(fc1(x)))
    bias_rows: int = (
        0  # of a table in each block, of which `bias` makes what is added to the logits
    )
    attention_dropout: float = 0.0  # of the attention probabilities
    hidden_dropout: float = 0.0  # of the wide features inside the MLP
    output_dropout: float = 0.0  # of what attention adds to the tokens
    mlp_dropout: float = 0.0  # of what the MLP adds to them
    layer_scale: float | None = None  # first value of a factor for each feature of what is added
    drop_path: float = 0.0  # probability that the last block adds nothing
    drop_path_rises: bool = (
        True  # from 0 at the first block; else it is that of the last one in all
    )


class Encoder(nn.Module):
    """The blocks as a scanned stack `layer`, whose parameters have a leading depth axis; the last one may be
    outside of it, `layer_11` of 12. At each of `cuts` another stack begins, `layer_from_10`.

    Neither the time to compile nor the size of the program grows with depth. The collection
    'intermediates', where it is mutable, gets 'input' BxLxD, 'layer/hidden_state' NxBxLxD, the output of
    each block, and 'layer/attention/probability' NxBxHxLxL; of a block apart without N.
    """

    config: BlockConfig
    dtype: Any
    remat: Remat = "none"
    last_block: LastBlock = "scanned"
    first: int = 0  # which block of a tower is the first of these; see weights/names.py
    cuts: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        bias: Bias | BiasOfTable | BiasOfKinds | None,
        deterministic: bool,
        rotary: Rotary | None = None,
        kind_N: Int[Array, " N"] | None = None,
        pick: Pick = first_token,
    ) -> Float[Array, "B Q D"]:
        """All tokens, or the one of each row that `pick` takes, as `last_block` says.

        `bias` is added to the attention logits: 0 and float32's lowest number, or learned ones.

        With `bias_rows` it is a function that makes it of the table that each block has. With `kind_N`
        `bias` and `rotary` have one more axis in front, and a block of kind i has what is there at i.
        """

        def step(
            block: nn.Module,
            x_BxLxD: Array,
            of_block: tuple[Array, Array | None],
            pick: Pick | None = None,
        ) -> tuple[Array, None]:
            drop_path, kind = of_block
            own_bias, own_rotary = bias, rotary
            if kind is not None:
                own_bias, own_rotary = jax.tree.map(lambda x: x[kind], (bias, rotary))
            y_BxLxD = block(x_BxLxD, own_bias, drop_path, deterministic, own_rotary, pick)
            return shard_batch(y_BxLxD), None

        cfg = self.config
        self.sow("intermediates", "input", x_BxLxD)
        first_rate = 0.0 if cfg.drop_path_rises else cfg.drop_path
        drop_path_N = jnp.linspace(first_rate, cfg.drop_path, cfg.depth)
        scanned = cfg.depth if self.last_block == "scanned" else cfg.depth - 1
        for name, blocks in stacks(self.first, scanned, self.cuts):
            scan = nn.scan(
                rematerialized(step, self.remat, prevent_cse=False),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=blocks.stop - blocks.start,
            )
            of_blocks = jax.tree.map(lambda x, blocks=blocks: x[blocks], (drop_path_N, kind_N))
            x_BxLxD, _ = scan(Block(cfg, self.dtype, name=name), x_BxLxD, of_blocks)
        if scanned < cfg.depth:
            name = f"layer_{self.first + scanned}"
            block = Block(cfg, self.dtype, name=name)
            of_block = jax.tree.map(lambda x: x[scanned], (drop_path_N, kind_N))
            # To keep this one block costs little, and to prevent it gathered split matrices twice more.
            of_one = functools.partial(step, pick=pick)
            last_step = of_one if self.last_block == "one token" else step
            of_last = rematerialized(last_step, self.remat, prevent_cse=False)
            x_BxLxD, _ = of_last(block, x_BxLxD, of_block)
        return x_BxLxD


class Block(nn.Module):
    """Attention, then an MLP; what each computes is added to the tokens.

    With `pick` the others are read and not computed: the attention of the one that it takes needs them as
    keys and values.
    """

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        bias: Bias | BiasOfTable | None,
        drop_path: Float[Array, ""],
        deterministic: bool,
        rotary: Rotary | None,
        pick: Pick | None = None,
    ) -> Float[Array, "B Q D"]:
        cfg = self.config
        attention = functools.partial(
            Attention(cfg, self.dtype, name="attention"),
            bias=bias,
            deterministic=deterministic,
            rotary=rotary,
            pick=pick,
        )
        mlp = functools.partial(Mlp(cfg, self.dtype, name="mlp"), deterministic=deterministic)
        for part, name, dropout in (
            (attention, "attention", cfg.output_dropout),
            (mlp, "mlp", cfg.mlp_dropout),
        ):
            norm = LayerNorm(
                cfg.norm_epsilon, self.dtype, "norm" not in cfg.without_bias, name=f"{name}_norm"
            )
            norm_first = cfg.norm_first and (name != "attention" or cfg.norm_attention)
            h_BxLxD = norm(x_BxLxD) if norm_first else x_BxLxD
            if pick is not None and name == "attention":  # from here on L is 1
                h_BxLxD, x_BxLxD = part(h_BxLxD, pick(h_BxLxD, 1)), pick(x_BxLxD, 1)
            else:
                h_BxLxD = part(h_BxLxD)
            h_BxLxD = Dropout(dropout)(h_BxLxD, deterministic=deterministic)
            if cfg.layer_scale is not None:
                h_BxLxD = LayerScale(cfg.layer_scale, name=f"{name}_scale")(h_BxLxD)
            if cfg.drop_path and not deterministic:
                row_shape = (len(h_BxLxD), 1, 1)  # a whole row is dropped or kept (1603.09382)
                h_BxLxD = drop(h_BxLxD, drop_path, self.make_rng("dropout"), row_shape)
            x_BxLxD = x_BxLxD + h_BxLxD
            if not cfg.norm_first:
                x_BxLxD = norm(x_BxLxD)
        self.sow("intermediates", "hidden_state", x_BxLxD)
        return x_BxLxD


class Attention(nn.Module):
    """Multi-head attention, of the tokens to each other or of `queries_BxQxD` to them.

    `bias` and `rotary` are of all tokens; `pick` takes what is the query's.
    """

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Tokens,
        queries_BxQxD: Float[Array, "B Q D"] | None = None,
        *,
        bias: Bias | BiasOfTable | None = None,
        deterministic: bool,
        rotary: Rotary | None = None,
        pick: Pick | None = None,
    ) -> Float[Array, "B Q D"]:
        cfg = self.config
        if cfg.width % cfg.num_heads:
            raise UserError(
                f"The model's config.json has hidden_size {cfg.width}, which is no multiple of its "
                f"num_attention_heads {cfg.num_heads}; correct it."
            )

        def heads(name: str, of_BxLxD: Array) -> Array:
            y_BxLxD = _dense(cfg, cfg.width, name, self.dtype)(of_BxLxD)
            return y_BxLxD.reshape(*y_BxLxD.shape[:2], cfg.num_heads, -1).swapaxes(1, 2)

        query_BxHxQxK = heads("query", x_BxLxD if queries_BxQxD is None else queries_BxQxD)
        key_BxHxLxK, value_BxHxLxK = heads("key", x_BxLxD), heads("value", x_BxLxD)
        if rotary is not None:
            of_queries = Rotary(*(pick(x, x.ndim - 2) for x in rotary)) if pick else rotary
            query_BxHxQxK = _rotate(query_BxHxQxK, of_queries)
            key_BxHxLxK = _rotate(key_BxHxLxK, rotary)
        if callable(bias):
            shape = (cfg.bias_rows, cfg.num_heads)
            bias = bias(self.param("position_bias_table", nn.initializers.zeros, shape))
        if pick and bias is not None and bias.shape[2] > 1:  # else it is the same for all queries
            bias = pick(bias, 2)

        shown = self.is_mutable_collection("intermediates")

        def dropout(weights_BxHxQxL: Array) -> Array:
            # The weights are not divided by their sum yet; see `attend`.
            if shown:
                probability = weights_BxHxQxL / weights_BxHxQxL.sum(-1, keepdims=True)
                self.sow("intermediates", "probability", probability)
            return Dropout(cfg.attention_dropout)(weights_BxHxQxL, deterministic=deterministic)

        drops = cfg.attention_dropout and not deterministic
        context_BxHxQxK = attend(
            query_BxHxQxK, key_BxHxLxK, value_BxHxLxK, bias, dropout if shown or drops else None
        )
        context_BxQxHxK = context_BxHxQxK.swapaxes(1, 2)
        context_BxQxD = context_BxQxHxK.reshape(*context_BxQxHxK.shape[:2], cfg.width)
        return _dense(cfg, cfg.width, "output", self.dtype)(context_BxQxD)


def _rotate(x_BxHxLxK: Array, rotary: Rotary) -> Array:
    """Turns the pairs (i, i + K/2) of a head by the angles of each token, in float32."""
    x = x_BxHxLxK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (table.reshape(-1, 1, *table.shape[-2:]) for table in rotary)  # Bx1xLxK
    return (x * cos + turned * sin).astype(x_BxHxLxK.dtype)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or down(activation(gate(x)) * up(x)) as in SwiGLU (2002.05202)."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: Tokens, *, deterministic: bool = True) -> Tokens:
        cfg, act = self.config, activation(self.config.activation)

        def wide(name: str) -> Tokens:
            return _dense(cfg, cfg.mlp_width, name, self.dtype)(x_BxLxD)

        # Other names for other layers: a family may have both, and calls them differently in files.
        h_BxLxF = act(wide("gate")) * wide("up") if cfg.gated_mlp else act(wide("fc1"))
        h_BxLxF = Dropout(cfg.hidden_dropout)(h_BxLxF, deterministic=deterministic)
        return _dense(cfg, cfg.width, "down" if cfg.gated_mlp else "fc2", self.dtype)(h_BxLxF)


class LayerScale(nn.Module):
    """A trained factor for each feature (2103.17239, section 2)."""

    first: float

    @nn.compact
    def __call__(self, x_BxLxD: Tokens) -> Tokens:
        factor_D = self.param("factor", nn.initializers.constant(self.first), x_BxLxD.shape[-1:])
        return scaled(x_BxLxD, factor_D)


def _dense(cfg: BlockConfig, features: int, name: str, dtype: Any) -> Dense:
    return dense(
        features,
        name=name,
        init_std=dict(cfg.own_init_std).get(name, cfg.init_std),
        init_cutoff=cfg.init_cutoff,
        dtype=dtype,
        use_bias=name not in cfg.without_bias,
    )
