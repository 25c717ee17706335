"""How parameters and optimizer state lie on the mesh: ordered regex rules, first match wins."""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lit_jax.distributed.mesh import REPLICATED, mesh_parts, replicated
from lit_jax.trees import Tree, flatten, unflatten

# Matrices are split over 'fsdp', and gathered where they are used. Vectors are too small to be worth it.
PARAMETER_RULES: tuple[tuple[str, str | None], ...] = (
    (r".*/(kernel|embedding)", "fsdp"),
    (r".*", None),
)


def parameter_shardings(params: Tree, mesh: Mesh) -> dict[str, Any]:
    """The NamedSharding of each parameter (arrays or shapes), as a tree like `params`."""
    flat = flatten(params)
    return unflatten({path: _sharding(path, leaf.shape, mesh) for path, leaf in flat.items()})


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    axis = next(axis for pattern, axis in PARAMETER_RULES if re.fullmatch(pattern, path))
    if axis is None or mesh.shape[axis] == 1:
        return replicated(mesh)
    return NamedSharding(mesh, matrix_spec(shape, axis, mesh.shape[axis]))


def matrix_spec(shape: tuple[int, ...], axis: str, parts: int) -> PartitionSpec:
    """The last two axes are input and output features: the longer one that divides is split over `axis`.
    A matrix of which neither does stays whole.

    The longer one, because the TPU compiler sums a gradient where its part lies only if that is wide: of
    128 columns in bfloat16 it was seen to sum all of the gradient everywhere. Of equals it is the rows.
    """
    candidates = range(max(len(shape) - 2, 0), len(shape))
    for split in sorted(candidates, key=lambda i: -shape[i]):
        if shape[split] % parts == 0:
            return PartitionSpec(*(axis if i == split else None for i in range(len(shape))))
    return REPLICATED


def fsdp_parts() -> int:
    """Into how many parts the mesh of `jax.set_mesh` cuts matrices; 1 without a mesh."""
    return mesh_parts().get("fsdp", 1)


def gathered(kernel: jax.Array) -> jax.Array:
    """A kernel whole on all devices of the mesh of `jax.set_mesh`, for the product that it is in.

    Left alone, the compiler gathers some kernels of a block twice for its gradient. What comes back is split
    at once as the kernel itself is, so that no device sums all of it.
    """
    parts = fsdp_parts()
    return kernel if parts == 1 else _gathered(matrix_spec(kernel.shape, "fsdp", parts), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(spec: PartitionSpec, kernel: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(kernel, REPLICATED)


_gathered.defvjp(
    lambda spec, kernel: (_gathered(spec, kernel), None),
    lambda spec, _, gradient: (jax.lax.with_sharding_constraint(gradient, spec),),
)


def optimizer_shardings(opt_state: Any, params: Tree, mesh: Mesh) -> Any:
    """Optimizer moments lie as their parameter does; counters and factored moments are replicated.

    `params` holds shapes with shardings, `opt_state` shapes; the result is a tree like `opt_state`.
    """
    flat = flatten(params)

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = flat.get("/".join(keys))
        if param is not None and param.shape == leaf.shape:
            return param.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, opt_state)
