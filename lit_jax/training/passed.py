"""Objects that a user passes into a run, in the place of those of the config, and their descriptions."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from lit_jax.data.example import Source
from lit_jax.training.losses import Objective
from lit_jax.training.model_factory import OwnTowers, TrainedModel

# Called with the model after some steps. Returns metrics to be reported, by flat names, or None.
Callback = Callable[[TrainedModel], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed:
    """Objects of a user's own.

    Attributes:
        source: training data, instead of those that config.data names.
        loss: what the step minimises, instead of config.loss.
        optimizer: instead of those of config.optimizer and config.schedule.
        towers: linen towers instead of those in the folders of config.model, by their side.
        callbacks: functions, each with the duration after which it is called again and again.
    """

    source: Source | None = None
    loss: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    towers: OwnTowers = dataclasses.field(default_factory=dict)
    callbacks: Sequence[tuple[str, Callback]] = ()

    def described(self) -> dict[str, Any]:
        """Return a description of each object that changes the result, as config.json records it.

        The content of a source is in its fingerprint, which data.json has; the parameters of a tower are in
        frozen/ and checkpoints/.
        """
        found = {name: describe(getattr(self, name)) for name in ("loss", "optimizer")}
        found["source"] = None if self.source is None else _named(type(self.source))
        towers = {side: describe(tower) for side, (tower, _) in self.towers.items()}
        found["towers"] = towers or None
        return {name: description for name, description in found.items() if description is not None}


def describe(value: Any) -> Any:
    """Return a description that differs between objects that compute different things, for JSON.

    It has the module and the qualified name of its type or function, and the content: fields, arguments of
    a partial, values that a closure has captured. Content that only code can reach is not seen.
    """
    return _describe(value, frozenset())


def _describe(value: Any, inside: frozenset[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in inside:
        return "itself"
    inside |= {id(value)}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:32]
        return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": digest}
    if isinstance(value, Mapping):
        return {str(key): _describe(part, inside) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(part, inside) for part in value]
    if isinstance(value, type):
        return _named(value)
    if isinstance(value, functools.partial):
        return _named(value.func) | {
            "function": _describe(value.func, inside),
            "arguments": _describe([*value.args], inside),
            "keywords": _describe(value.keywords, inside),
        }
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
    if dataclasses.is_dataclass(value):
        # The parent of a linen module is where it is used, and no part of it.
        names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        fields = {name: getattr(value, name) for name in names}
    else:
        fields = getattr(value, "__dict__", {})
    return _named(type(value)) | {"fields": _describe(fields, inside)}


def _named(value: Any) -> dict[str, str]:
    return {"module": value.__module__, "name": value.__qualname__}
