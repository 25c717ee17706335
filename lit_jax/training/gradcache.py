"""A step whose activations do not fit: the towers run in micro-batches, the loss sees the whole batch.

Contrastive losses of micro-batches do not add up to that of the batch, whose negatives are all other
pairs. So the embeddings of all are computed first, and the towers run once more, micro-batch by
micro-batch, when the gradient of the embeddings is known (gradient caching, 2101.06983, section 3).

Dims: B batch, K micro-batches, D devices.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lit_jax.distributed.mesh import BATCH, mesh_parts, mesh_size, shard_batch
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import POOLED
from lit_jax.training.policy import Policy

Embed = Callable[..., tuple[Any, Mapping[str, Any]]]


def accumulated(embed: Embed, micro_batches: int) -> Embed:
    """`embed`, with the memory of a micro-batch: its gradient computes the activations again.

    The gradient is that of the whole batch. A locked tower runs once: what it pools is kept. Dropout draws
    the same in both runs, but each micro-batch has a key of its own: a step with dropout is as exact as one
    in a single piece, but drops other numbers.
    """
    if micro_batches == 1:
        return embed

    def embed_in_parts(
        variables: Any, batch: Mapping[str, jax.Array], *, rngs: dict, mutable: Any, **modes: bool
    ) -> tuple[Any, dict[str, Any]]:
        del mutable  # the parts' statistics are not those of the batch: see `check_accumulation`

        # In a scan, nothing merges the second run with the first one.
        @functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names(*POOLED.values()),
            prevent_cse=False,
        )
        def embed_part(variables: Any, part: dict[str, jax.Array], number: jax.Array) -> Any:
            keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
            return embed(variables, part, rngs=keys, mutable=["batch_stats"], **modes)[0]

        parts = {name: cut(array, micro_batches) for name, array in batch.items()}
        numbers = jnp.arange(micro_batches)
        outputs = jax.lax.map(lambda part: embed_part(variables, *part), (parts, numbers))
        # Rows are put together; the scale and the bias are the same each time.
        return jax.tree.map(lambda x: join(x) if x.ndim > 1 else x[0], outputs), {}

    return embed_in_parts


def check_accumulation(micro_batches: int, policy: Policy) -> None:
    """Raises UserError if a tower that trains normalises by the batch."""
    if micro_batches > 1 and (towers := normalized_by_batch(policy)):
        raise UserError(
            f"config.accumulate={micro_batches}: {towers[0]} trains with batch normalisation, over the whole "
            "batch, which no micro-batch knows; set it to 1, or lock the tower."
        )


def normalized_by_batch(policy: Policy) -> list[str]:
    """The towers that train with batch normalisation."""
    towers = {path.split("/")[0] for path, trains in policy.trainable.items() if trains}
    statistics = [path for path in policy.trainable if re.fullmatch(r".*/(mean|var)", path)]
    return sorted(towers & {path.split("/")[0] for path in statistics})


def cut(x_Bx: jax.Array, micro_batches: int) -> jax.Array:
    """B... as KxB/K..., each micro-batch with its part of every device's rows: nothing is sent."""
    parts = x_Bx.reshape(mesh_size(), micro_batches, -1, *x_Bx.shape[1:])
    return _split_second(parts.swapaxes(0, 1).reshape(micro_batches, -1, *x_Bx.shape[1:]))


def join(parts_KxN: jax.Array) -> jax.Array:
    """The array of which `cut` made KxB/K... ones."""
    count, _, *shape = parts_KxN.shape
    rows = _split_second(parts_KxN).reshape(count, mesh_size(), -1, *shape)
    return shard_batch(rows.swapaxes(0, 1).reshape(-1, *shape))


def _split_second(x: jax.Array) -> jax.Array:
    if not mesh_parts():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *BATCH))
