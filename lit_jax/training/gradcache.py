"""GradCache: the towers run in micro-batches that fit into memory, and the loss sees the whole batch.

The contrastive losses of micro-batches do not add up to the loss of the batch, where all other pairs are
negatives. So the embeddings of the whole batch are computed first. When their gradient is known, the towers
run again, micro-batch by micro-batch (gradient caching, 2101.06983, section 3).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.distributed.mesh import cut, join
from lit_jax.models.dual_encoder import FEATURES

Forward = Callable[..., tuple[Any, Mapping[str, Any]]]


def in_micro_batches(forward: Forward, micro_batches: int) -> Forward:
    """Return `forward` with the memory of one micro-batch, whose gradient recomputes the activations.

    The gradient equals that of the whole batch. A locked tower runs only once, because its features are
    saved. Dropout is the same in both runs, but each micro-batch has its own key. A step with dropout is
    therefore as exact as a step in one piece, but drops other numbers.
    """
    if micro_batches == 1:
        return forward

    def forward_in_parts(
        variables: Any, batch: Mapping[str, jax.Array], *, rngs: dict, mutable: Any, **modes: bool
    ) -> tuple[Any, dict[str, Any]]:
        # The statistics of the parts are not those of the batch; `checks.check_accumulation` forbids them.
        del mutable

        # prevent_cse is not needed in a scan: the compiler cannot merge the two runs across two loops.
        @functools.partial(
            jax.checkpoint,
            # Features are small. With them saved, the gradient of a locked tower's side starts at its
            # projection.
            policy=jax.checkpoint_policies.save_only_these_names(*FEATURES.values()),
            prevent_cse=False,
        )
        def forward_part(variables: Any, part: dict[str, jax.Array], number: jax.Array) -> Any:
            keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
            return forward(variables, part, rngs=keys, mutable=["batch_stats"], **modes)[0]

        parts = {name: cut(array, micro_batches) for name, array in batch.items()}
        numbers = jnp.arange(micro_batches)
        outputs = jax.lax.map(lambda part: forward_part(variables, *part), (parts, numbers))
        # Outputs with rows are joined. The scale and the bias are the same in each part.
        return jax.tree.map(lambda x: join(x) if x.ndim > 1 else x[0], outputs), {}

    return forward_in_parts
