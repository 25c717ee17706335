"""How parameters and optimizer state lie on the mesh: ordered regex rules, first match wins."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lit_jax.distributed.mesh import replicated
from lit_jax.errors import UserError
from lit_jax.trees import Tree, flatten, unflatten

# A parameter's last axis is its output features: matrices are split there over 'fsdp', and the compiler
# gathers them where they are used. Vectors are too small to be worth it.
PARAMETER_RULES: tuple[tuple[str, str | None], ...] = (
    (r".*/(kernel|embedding)", "fsdp"),
    (r".*", None),
)


def parameter_shardings(params: Tree, mesh: Mesh) -> dict[str, Any]:
    """The NamedSharding of each parameter (arrays or shapes), as a tree like `params`.

    Raises UserError if the last axis of a parameter that a rule splits does not divide evenly.
    """
    flat = flatten(params)
    return unflatten({path: _sharding(path, leaf.shape, mesh) for path, leaf in flat.items()})


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    axis = next(axis for pattern, axis in PARAMETER_RULES if re.fullmatch(pattern, path))
    if axis is None or mesh.shape[axis] == 1:
        return replicated(mesh)
    if shape[-1] % mesh.shape[axis]:
        raise UserError(
            f"The last axis of {path} {shape} does not divide by config.mesh.fsdp={mesh.shape[axis]}; "
            "choose a size that divides it."
        )
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 1), axis))


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
