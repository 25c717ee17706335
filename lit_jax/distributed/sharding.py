"""The sharding of parameters and optimizer state by an ordered list of regex rules; the first match wins."""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lit_jax.distributed.mesh import REPLICATED, mesh_shape, replicated
from lit_jax.trees import Tree, flatten, unflatten

# Matrices are split over 'fsdp' and gathered for each product. Vectors are too small to be worth a gather.
PARAMETER_RULES: tuple[tuple[str, str | None], ...] = (
    (r".*/(kernel|embedding)", "fsdp"),
    (r".*", None),
)


def parameter_shardings(params: Tree, mesh: Mesh) -> dict[str, Any]:
    """Return the NamedSharding of each parameter (arrays or shapes), as a tree like `params`."""
    flat = flatten(params)
    return unflatten({path: _sharding(path, leaf.shape, mesh) for path, leaf in flat.items()})


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    axis = next(axis for pattern, axis in PARAMETER_RULES if re.fullmatch(pattern, path))
    if axis is None or mesh.shape[axis] == 1:
        return replicated(mesh)
    return NamedSharding(mesh, matrix_spec(shape, axis, mesh.shape[axis]))


def matrix_spec(shape: tuple[int, ...], axis: str, parts: int) -> PartitionSpec:
    """Return the spec that splits one of the last two axes over `axis`: the longer one that `parts` divides.

    If `parts` divides neither, the matrix stays whole. If both have the same length, the rows are split.
    """
    # The longer axis is split, because the TPU compiler reduce-scatters a gradient only if the part is wide:
    # with 128 columns in bfloat16 it was seen to sum the whole gradient on every device. Leading axes are the
    # depth of scanned stacks: if a stack is split there, the compiler gathers all of it before the scan.
    candidates = range(max(len(shape) - 2, 0), len(shape))
    for split in sorted(candidates, key=lambda i: -shape[i]):
        if shape[split] % parts == 0:
            return PartitionSpec(*(axis if i == split else None for i in range(len(shape))))
    return REPLICATED


def fsdp_size() -> int:
    """Return the number of parts into which the mesh of `jax.set_mesh` cuts matrices; 1 without a mesh."""
    return mesh_shape().get("fsdp", 1)


def all_gather_kernel(kernel: jax.Array) -> jax.Array:
    """Return a kernel gathered on all devices of the mesh of `jax.set_mesh`, for one product.

    Without this constraint the compiler gathers some kernels of a block twice for its gradient. The gradient
    gets the sharding of the kernel at once, so that no device sums the whole gradient.
    """
    parts = fsdp_size()
    return kernel if parts == 1 else _all_gather(matrix_spec(kernel.shape, "fsdp", parts), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_gather(spec: PartitionSpec, kernel: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(kernel, REPLICATED)


# The derived gradient of a sharding constraint repeats the constraint, which would replicate the gradient.
_all_gather.defvjp(
    lambda spec, kernel: (_all_gather(spec, kernel), None),
    lambda spec, _, gradient: (jax.lax.with_sharding_constraint(gradient, spec),),
)


def optimizer_shardings(opt_state: Any, params: Tree, mesh: Mesh) -> Any:
    """Return the sharding of each leaf of `opt_state`, a tree of shapes.

    A moment has the sharding of its parameter in `params`, a tree of shapes with shardings. Counters and
    factored moments are replicated.
    """
    flat = flatten(params)

    def get_sharding(path: tuple[Any, ...], leaf: Any) -> Any:
        # Optax wraps the parameters in its own tuples. The dict keys alone are the path of the parameter.
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = flat.get("/".join(keys))
        if param is not None and param.shape == leaf.shape:
            return param.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(get_sharding, opt_state)
