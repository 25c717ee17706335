"""A tower run over a whole data set: the only loop, shared by features on disk and evaluations."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lit_jax.distributed.finite import check_rows
from lit_jax.distributed.mesh import REPLICATED, global_batch
from lit_jax.models.dual_encoder import (
    TEXT_INPUTS,
    TOWERS,
    DualEncoderModule,
    Side,
    normalize,
    tower_name,
)
from lit_jax.trees import Tree

# "features" are the inputs of the projection, "embeddings" its outputs scaled to unit length.
Output = Literal["features", "embeddings"]
Batch = Mapping[str, np.ndarray]

_METHODS = {"features": "{}_features", "embeddings": "encode_{}"}
_INPUTS: Mapping[Side, tuple[str, ...]] = {"image": ("pixel_values",), "text": TEXT_INPUTS}


def run_tower(
    module: DualEncoderModule,
    params: Tree,
    mesh: jax.sharding.Mesh,
    batches: Iterable[Batch],
    *,
    side: Side,
    output: Output,
) -> Iterator[tuple[Float[np.ndarray, "R E"], Int[np.ndarray, " R"]]]:
    """Yield the outputs of a tower for each batch, complete on every process of the mesh.

    A batch is fetched after the next batch has been started. So the devices do not wait for the host, and at
    most two batches are in memory.

    Args:
        params: the parameters of the dual encoder, on the mesh; those of the other tower may be absent.
        batches: this process's rows of each batch, all batches of one size: the inputs of the tower, and
            'index' int32, the index of each row, or -1 for a row that only fills up the batch.

    Yields the R rows that have an index, in the tower's dtype ("embeddings": float32), and these indices.
    Raises UserError if a row is not finite.
    """
    outputs = _start(module, params, mesh, batches, side, output)
    # pairwise asks for batch i + 1, which starts it, before it yields batch i.
    for started, _ in itertools.pairwise(itertools.chain(outputs, [None])):
        rows_BxE, finite_B, index_B = jax.device_get(started)
        is_real_B = index_B >= 0
        with jax.set_mesh(mesh):
            others: list[Side] = [other for other in TOWERS if other != side]
            check_rows(finite_B[is_real_B], side, without_towers(params, others))
        yield rows_BxE[is_real_B], index_B[is_real_B]


def _start(
    module: DualEncoderModule,
    params: Tree,
    mesh: jax.sharding.Mesh,
    batches: Iterable[Batch],
    side: Side,
    output: Output,
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    for batch in batches:
        with jax.set_mesh(mesh):
            outputs = _outputs(params, global_batch(batch, mesh), module, side, output)
        # Outside of the mesh, which would otherwise stay set in the caller while the generator is suspended.
        yield outputs


# The module is a static argument, so all callers with an equal module share one compiled program.
@functools.partial(jax.jit, static_argnames=("module", "side", "output"))
def _outputs(
    params: Tree,
    batch: Mapping[str, jax.Array],
    module: DualEncoderModule,
    side: Side,
    output: Output,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the outputs, a flag for each finite row, and the indices of the rows.

    The indices go through the devices like the rows, because a mesh may interleave the processes.
    """
    # An input that the tokenizer does not make, such as token_type_ids, is None.
    inputs = [batch.get(name) for name in _INPUTS[side]]
    method = _METHODS[output].format(side)
    rows_BxE: Any = module.apply({"params": params}, *inputs, deterministic=True, method=method)
    # `encode_image` and `encode_text` project without normalising.
    if output == "embeddings":
        rows_BxE = normalize(rows_BxE)
    finite_B = jnp.isfinite(rows_BxE).all(axis=1)
    return jax.lax.with_sharding_constraint((rows_BxE, finite_B, batch["index"]), REPLICATED)


def without_towers(params: Tree, sides: Iterable[Side]) -> Tree:
    """Return the parameters of a dual encoder without those of the towers of `sides`."""
    absent = {tower_name(side) for side in sides}
    return {name: part for name, part in params.items() if name not in absent}
