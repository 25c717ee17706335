"""The checks of what a user passes to fit: the kinds of the objects, and what the functions return."""

import inspect
import logging
import math
import multiprocessing
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lit_jax.buckets import BucketPath
from lit_jax.config import Config
from lit_jax.display import kind_of
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import TOWERS
from lit_jax.models.tower import Tower
from lit_jax.training.losses import Objective
from lit_jax.training.metrics import ROW_COLUMNS

log = logging.getLogger(__name__)

# The columns that the train step itself adds to those of the model's output.
_STEP_COLUMNS = ("loss", "grad_norm", "learning_rate")


def _check_not_importing() -> None:
    """Raise UserError in a process of multiprocessing that is only importing the script that started it."""
    # multiprocessing has this attribute while it imports, and refuses to start processes then. Without this
    # check a worker would train in the run folder of its own run.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "fit is called while a data worker imports this script; put the call below `if __name__ == "
            '"__main__":`, or set config.data.workers=0.'
        )


def check_arguments(config: Any, workdir: Any, allowed_changes: Any) -> None:
    """Raise UserError if an argument of fit is of another kind than fit takes, or a data worker calls fit."""
    _check_not_importing()
    if not isinstance(config, Config | ConfigDict | Mapping):
        raise UserError(
            f"The config that was passed to fit is {config!r:.80}; pass the config of a recipe, such as "
            "lit_jax.configs.vit_bert.get_config()."
        )
    if not isinstance(workdir, str | os.PathLike | BucketPath):
        raise UserError(
            f"The workdir that was passed to fit is {kind_of(workdir)}; pass the path of the run folder."
        )
    # A string is a collection of its parts, so "data" would be in "data.train.path".
    if isinstance(allowed_changes, str):
        raise UserError(
            f"The allowed_changes of fit are a string; pass a list such as [{allowed_changes!r}]."
        )


def check_objects(*, loss: Any, optimizer: Any, towers: Any, callbacks: Any) -> None:
    """Raise UserError if an object that is passed to fit is of another kind than fit takes."""
    if loss is not None:
        _check_function(loss, "The loss that was passed to fit", ("output", "batch"))
    _check_optimizer(optimizer)
    _check_towers(towers)
    _check_callbacks(callbacks)


def _check_optimizer(optimizer: Any) -> None:
    """Raise UserError if a passed optimizer is not a transformation of optax."""
    if optimizer is not None and not all(
        callable(getattr(optimizer, name, None)) for name in ("init", "update")
    ):
        raise UserError(
            f"The optimizer that was passed to fit is {kind_of(optimizer)}, which has no init and update; "
            "pass a transformation of optax, such as optax.adam(1e-3)."
        )


def _check_towers(towers: Any) -> None:
    """Raise UserError if passed towers are not a mapping of sides to modules, with parameters or without."""
    if not isinstance(towers, Mapping) or not {*towers} <= {*TOWERS}:
        given = (
            f"with the keys {', '.join(map(repr, towers))}" if isinstance(towers, Mapping) else ""
        )
        raise UserError(
            f"The towers that were passed to fit are {kind_of(towers)} {given}".rstrip()
            + '; pass a dict of modules by side, such as {"image": module}.'
        )
    for side, tower in towers.items():
        module, *params = tower if isinstance(tower, tuple) else (tower,)
        if not isinstance(module, Tower):
            raise UserError(
                f"The {side} tower that was passed to fit is {kind_of(module)}; pass an object of a subclass "
                "of lit_jax.models.tower.Tower, or a pair of it and its parameters."
            )
        if len(params) > 1 or not all(isinstance(tree, Mapping) for tree in params):
            raise UserError(
                f"The {side} tower that was passed to fit has {', '.join(map(kind_of, params)) or 'nothing'} "
                "beside its module; pass (module, params), where params is a nested dict of arrays."
            )


def _check_callbacks(callbacks: Any) -> None:
    """Raise UserError if callbacks are not a sequence of pairs of a duration and a function."""
    if not isinstance(callbacks, list | tuple):
        raise UserError(
            f"The callbacks that were passed to fit are {kind_of(callbacks)}; pass a list of pairs such as "
            '("1000 steps", function).'
        )
    for number, pair in enumerate(callbacks):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(
                f"callbacks[{number}] of fit is {kind_of(pair)}; pass a pair of a duration and a function, "
                'such as ("1000 steps", function).'
            )
        _check_function(pair[1], f"The function of callbacks[{number}] of fit", ("trained",))


def _check_function(function: Any, name: str, arguments: tuple[str, ...]) -> None:
    call = f"{name.split()[1]}({', '.join(arguments)})"
    # A class can be called, too, but makes an object of the arguments.
    if isinstance(function, type) or not callable(function):
        raise UserError(f"{name} is {kind_of(function)}; pass a function that is called as {call}.")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{name} cannot be called as {call} ({error}); change its arguments, or set the others by "
            "functools.partial."
        ) from None
    # Some functions written in C have no signature.
    except ValueError:
        return


def checked_loss(loss: Objective) -> Objective:
    """Return a passed loss that raises UserError, when traced, for results that no step can use."""

    def checked(output: Any, batch: Any) -> Any:
        result = loss(output, batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise UserError(
                f"The loss returns {_returned(result)}; return a pair of the value and a dict of metrics, "
                "such as (value, {})."
            )
        value, metrics = result
        if not _is_scalar(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise UserError(
                f"The loss returns a value {_shape(value)}; return a float32 scalar, such as a mean."
            )
        _check_scalars(metrics, "The loss")
        taken = {*_STEP_COLUMNS, *output.metrics}
        for name in metrics:
            if name in taken or ROW_COLUMNS.fullmatch(name):
                raise UserError(
                    f"The loss returns a metric {name!r}, a name that lit_jax has for a column of its own; "
                    "rename the metric."
                )
        return value, dict(metrics)

    return checked


def checked_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Return a passed optimizer that raises UserError, when traced, if it needs what no step has."""
    own = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        try:
            return own.update(updates, state, params, **extra)
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            raise UserError(
                f"The optimizer that was passed to fit needs more than a step has ({error}); pass one that "
                "needs no more than gradient, parameters and value."
            ) from error

    return optax.GradientTransformationExtraArgs(own.init, update)


def callback_result(result: Any, number: int) -> dict[str, float]:
    """Return the metrics that the callback of this number returned, none for None.

    A number that is not finite is left out with a warning, because it may come late in a long run.

    Raises UserError for anything but numbers by their names.
    """
    if result is None:
        return {}
    who = f"callbacks[{number}]"
    if not isinstance(result, Mapping):
        raise UserError(f"{who} returns {_returned(result)}; return a dict of numbers, or None.")
    _check_scalars(result, who)
    values = {name: float(value) for name, value in result.items()}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for name in values.keys() - finite.keys():
        log.warning(
            "%s returns %s for %r, which metrics.jsonl cannot hold; it is left out.",
            who,
            values[name],
            name,
        )
    return finite


def _check_scalars(metrics: Mapping[Any, Any], who: str) -> None:
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise UserError(f"{who} returns a metric named {name!r}; make the name a string.")
        if not _is_scalar(value):
            raise UserError(
                f"{who} returns a metric {name!r} {_shape(value)}; return numbers, such as a mean."
            )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.ndarray | np.generic | jax.Array) and (
        jnp.shape(value) == () and _is_number(jnp.result_type(value))
    )


def _is_number(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_


def _returned(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return "None" if value is None else f"a value {_shape(value)}"


def _shape(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return f"of dtype {value.dtype} and shape {value.shape}"
    return f"of type {type(value).__name__}"
