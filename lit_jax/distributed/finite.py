"""The search for NaN and infinite values on the devices; only counts leave the devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lit_jax.distributed.mesh import REPLICATED
from lit_jax.errors import UserError
from lit_jax.trees import Tree, flatten

# The number of parameters that a message names; a diverged model has hundreds.
_LISTED = 3


@jax.jit
def _count(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    counts = {path: (~jnp.isfinite(leaf)).sum(dtype=jnp.int32) for path, leaf in leaves.items()}
    return jax.lax.with_sharding_constraint(counts, REPLICATED)


def not_finite(params: Tree) -> str:
    """Return the paths of parameters with NaN or infinite values and their counts; '' if all are finite.

    All processes must call this function, under `jax.set_mesh`.
    """
    counts = jax.device_get(_count(flatten(params)))
    found = [f"{path} ({int(count)})" for path, count in counts.items() if count]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def check_rows(finite_B: Bool[np.ndarray, " B"], side: str, params: Tree) -> None:
    """Raise UserError unless all rows that a tower has computed are finite.

    All processes that hold the parameters must call this function, under `jax.set_mesh`.

    Args:
        finite_B: whether each row is finite.
        params: the parameters that the rows depend on, searched only to write the message.
    """
    if finite_B.all():
        return
    # Bad parameters and an overflow need different remedies, so the message says which of them it is.
    if found := not_finite(params):
        reason = f"its parameters have NaN or infinite values: {found}; load other weights"
    else:
        reason = "its parameters are finite, so its computation overflows; load other weights"
    bad = len(finite_B) - int(finite_B.sum())
    raise UserError(
        f"The {side} tower gives NaN or infinite embeddings, {bad} of {len(finite_B)} in a batch; {reason}."
    )
