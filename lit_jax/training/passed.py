"""The objects that a user passes into a run instead of configuring them, and their descriptions."""

import copyreg
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lit_jax.data.example import Source
from lit_jax.training.losses import Objective
from lit_jax.training.model_factory import OwnTowers, TrainedModel

# A function that is called with the model after some steps. It returns metrics to report, by flat names, or
# None.
Callback = Callable[[TrainedModel], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed:
    """The objects that a user passes.

    Attributes:
        source: the training data, instead of the data that config.data names.
        loss: the objective of the step, instead of config.loss.
        optimizer: the optimizer, instead of config.optimizer and config.schedule.
        towers: linen towers by their side, instead of those that config.model names.
        callbacks: (duration between two calls, function) of each callback.
    """

    source: Source | None = None
    loss: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    towers: OwnTowers = dataclasses.field(default_factory=dict)
    callbacks: Sequence[tuple[str, Callback]] = ()

    def described(self) -> dict[str, Any]:
        """Return a description of each object that changes the result, as config.json records it.

        The description leaves out the content of a source, whose fingerprint is in data.json, and the
        parameters of a tower, which are in frozen/ and checkpoints/.
        """
        found = {name: describe(getattr(self, name)) for name in ("loss", "optimizer")}
        found["source"] = None if self.source is None else _named(type(self.source))
        towers = {side: describe(tower) for side, (tower, _) in self.towers.items()}
        found["towers"] = towers or None
        return {name: description for name, description in found.items() if description is not None}


def describe(value: Any) -> Any:
    """Return a JSON description that differs between objects that compute different things.

    The description has the module and the qualified name of the type or function, and the content: fields,
    arguments of a partial, values that a closure has captured. Content that only code can reach is not seen,
    such as globals.
    """
    return _describe(value, frozenset())


def _describe(value: Any, inside: frozenset[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # An object may contain itself, as a bound method in a field does.
    if id(value) in inside:
        return "itself"
    inside |= {id(value)}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {"key": _describe(jax.random.key_data(value), inside)}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _describe_array(np.asarray(value), inside)
    if isinstance(value, Mapping):
        return {str(key): _describe(part, inside) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(part, inside) for part in value]
    if isinstance(value, bytes | bytearray | complex):
        return _named(type(value)) | {"sha256": _digest(repr(value).encode())}
    if isinstance(value, set | frozenset):
        # The order of a set differs between processes.
        return sorted((_describe(part, inside) for part in value), key=str)
    if isinstance(value, type) or inspect.isbuiltin(value):
        return _named(value)
    # Methods of two objects differ by their objects alone.
    if inspect.ismethod(value):
        return _named(value.__func__) | {"object": _describe(value.__self__, inside)}
    if isinstance(value, functools.partial):
        return _named(value.func) | {
            "function": _describe(value.func, inside),
            "arguments": _describe([*value.args], inside),
            "keywords": _describe(value.keywords, inside),
        }
    # jax.jit and functools.wraps keep the function that computes in __wrapped__.
    function = inspect.unwrap(value)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function).nonlocals
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return _named(function) | {
            "captured": _describe(variables, inside),
            "defaults": _describe(defaults, inside),
        }
    if isinstance(value, np.dtype):
        return value.name
    return _named(type(value)) | {"fields": _describe(_fields(value), inside)}


def _describe_array(array: np.ndarray, inside: frozenset[int]) -> dict[str, Any]:
    if array.dtype.hasobject:
        return {"dtype": "object", "items": _describe(array.tolist(), inside)}
    # An array may be large, and config.json is read by people.
    shape, digest = list(array.shape), _digest(array.tobytes())
    return {"dtype": array.dtype.name, "shape": shape, "sha256": digest}


def _fields(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value):
        # The parent of a linen module says where the module is used; it is not part of the module.
        names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        return {name: getattr(value, name) for name in names}
    return value.__dict__ if hasattr(value, "__dict__") else _pickled_parts(value)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _pickled_parts(value: Any) -> dict[str, Any]:
    """Return the content of an object without fields in `__dict__`, such as a path, as pickle sees it."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
    # Any type of error means that the object has no content that can be stored.
    except Exception:
        return {}
    if isinstance(parts, str):
        return {"name": parts}
    # After the function that makes the object: its arguments, a state, and the items of a list and a dict.
    names = ("arguments", "state", "items", "entries")
    return {
        name: part if name in ("arguments", "state") else [*part]
        for name, part in zip(names, parts[1:], strict=False)
        if part is not None
    }


def _named(value: Any) -> dict[str, str]:
    return {"module": value.__module__, "name": value.__qualname__}
