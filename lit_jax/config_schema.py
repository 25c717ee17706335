"""The schema of the config: types and limits of values, names of keys, and the conversion of raw values.

`convert` turns the content of a ConfigDict or config.json into the frozen dataclasses of config.py.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from lit_jax.errors import UserError


class Range(NamedTuple):
    """The range of a number, both ends included."""

    least: int | float
    most: int | float = math.inf


# Step numbers and sizes are 32-bit integers on a device.
MOST = 2**31 - 1
# A number that float32 cannot hold would be infinite on a device.
LARGEST_FLOAT = 3.4e38

Count = Annotated[int, Range(1, MOST)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(1e-6)]
Fraction = Annotated[float, Range(0, 1)]
# A moment with a decay of 1 never changes, so the limit is slightly lower. Adafactor, for which b2 is a cap,
# stays below this limit for 3e7 steps.
Decay = Annotated[float, Range(0, 0.999999)]
_AMOUNT = r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s+"
_DURATION = re.compile(_AMOUNT + r"(step|epoch|example)s?\s*")
_TIME = re.compile(_AMOUNT + r"(second|minute)s?\s*")
_INTERVAL = re.compile(f"{_DURATION.pattern}|{_TIME.pattern}")
# A text such as "300 steps", "2.5 epochs" or "9e8 examples"; see `steps`.
Duration = Annotated[str, _DURATION]
# A duration, or a time on the clock such as "30 seconds" or "10 minutes"; see `seconds`.
Interval = Annotated[str, _INTERVAL]
# A text such as "100:110"; see `step_range`.
StepRange = Annotated[str, re.compile(r"([0-9]{1,10}):([0-9]{1,10})")]
_EXPECTED = {
    Duration: "a duration; write for example '300 steps', '2.5 epochs' or '9e8 examples'",
    Interval: "a duration; write for example '300 steps', '2.5 epochs', '9e8 examples', '30 seconds' or "
    "'10 minutes'",
    StepRange: "a range of steps; write the first and the last, for example '100:110'",
}


class UnknownKeyError(Exception):
    """A group of the config has no such key.

    Args:
        chosen: the dataclass that `name` has chosen for the group, if the group has a choice.
    """

    def __init__(self, group: str, key: str, chosen: Any = None):
        super().__init__(f"{group}.{key}")
        self.group, self.key, self.chosen = group, key, chosen

    def as_user_error(self, root: Any) -> UserError:
        """Return an error that suggests the nearest key of the whole config, the dataclass `root`."""
        if self.chosen is None:
            nearest_key = _nearest_key(root, self.group, self.key)
            return UserError(f"{self} is not a config key; {nearest_key}.")
        own = sorted(get_type_hints(self.chosen).keys() - {"name"})
        others = [
            path
            for path in namesakes(root, self.key, self.group.partition(".")[0])
            if path != str(self)
        ]
        hint = f" (did you mean {' or '.join(map(repr, others))}?)" if others else ""
        return UserError(
            f"{self} is not a key of {self.group}.name={self.chosen.name!r}, which has "
            f"{', '.join(own)}{hint}; leave it out, or choose another name."
        )


def key_type(root: Any, keys: Sequence[str], name: str = "config") -> Any:
    """Return the type of the key at a path below the dataclass `root`, or Any below an untyped value.

    `name` is the root's name in messages. Raises UnknownKeyError for a key that a group lacks.
    """
    kind = root
    for depth, key in enumerate(keys):
        if choices := _choices(kind):
            hints = _hints(choices)
            if key not in hints:
                raise UnknownKeyError(".".join((name, *keys[:depth])), ".".join(keys[depth:]))
            kind = hints[key]
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else Any
    return kind


def _choices(kind: Any) -> tuple[type, ...]:
    """Return the dataclasses of a group: one, or several of which the key `name` chooses; else ()."""
    kinds = get_args(kind) if get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    return kinds if all(map(dataclasses.is_dataclass, kinds)) else ()


def _hints(choices: Iterable[type]) -> dict[str, Any]:
    """Return the types of all keys of a group, whichever of its dataclasses is chosen."""
    hints: dict[str, Any] = {}
    for choice in choices:
        for key, hint in get_type_hints(choice).items():
            hints[key] = hints[key] | hint if key in hints else hint
    return hints


# Former name of a key -> its present name.
RENAMED = {"loss_form": "loss_implementation"}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'" for a mistyped name, or the list of all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"


def namesakes(root: Any, key: str, name: str = "config") -> list[str]:
    """Return the paths of at most three keys whose path ends with `key`, which may contain dots."""
    paths = dict(_key_types(root, name))
    found = [path for path in paths if path.endswith(f".{key}")]
    # The keys nearest to the root come first; among those of one depth, numbers and texts before lists of
    # rules, which set the same for single parameters.
    return sorted(found, key=lambda path: (path.count("."), get_origin(paths[path]) is tuple))[:3]


def _nearest_key(root: Any, group: str, key: str) -> str:
    """Return "did you mean 'x'" for a key that a group lacks, or the list of the group's keys.

    Keys of other groups are suggested, too: the learning rate is a key of `schedule`, not of `optimizer`.

    Args:
        root: the dataclass of the whole config.
        group: the path of the group, such as 'config.optimizer'.
        key: the unknown key in the group, with the keys below it if there are any.
    """
    if key in RENAMED:
        return f"it is {RENAMED[key]!r} now"
    name = group.partition(".")[0]
    if elsewhere := namesakes(root, key, name):
        return "did you mean " + " or ".join(map(repr, elsewhere))
    key = key.partition(".")[0]
    own = _hints(_choices(key_type(root, group.split(".")[1:])))
    if not difflib.get_close_matches(key, own, n=1):
        # The cutoff is high, because among so many names one is always similar: 'eps' does not mean 'steps'.
        names = {path.rpartition(".")[2] for path, _ in _key_types(root, name)}
        if close := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return "did you mean " + " or ".join(map(repr, namesakes(root, close[0], name)))
    return nearest(key, own)


def _key_types(kind: Any, group: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the type of each key and group below a dataclass, or a choice of dataclasses."""
    for key, hint in _hints(_choices(kind)).items():
        path = f"{group}.{key}"
        yield path, hint
        # The members of a dict have names chosen by the user.
        if get_origin(hint) is dict:
            path, hint = f"{path}.NAME", get_args(hint)[1]
        yield from _key_types(hint, path)


def convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` converted to the annotated type `kind`; `where` names the value in messages.

    Raises UserError for another type or a number out of its range, and UnknownKeyError for a key that a
    dataclass lacks.
    """
    if choices := _choices(kind):
        return _convert_dataclass(choices, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        # JSON has no tuples, and a config has to equal itself after a round trip through config.json.
        return list(value) if isinstance(value, tuple) else value
    if origin is Annotated:
        converted, limit = convert(args[0], value, where), args[1]
        if isinstance(limit, Range):
            return _in_range(converted, limit, where)
        if limit.fullmatch(converted):
            return converted
        raise UserError(f"{where}={converted!r} is not {_EXPECTED[kind]}.")
    if origin is Literal:
        if value not in args:
            raise UserError(
                f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}."
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (t for t in args if t is not types.NoneType)
        return convert(inner, value, where)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(convert(t, v, where) for t, v in zip(args, value, strict=True))
    # In Python a bool is an int, too, but True as a learning rate is a mistake.
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            return float(value)
        raise UserError(f"{where} is {_shown(value)}; it must be a number that float32 can hold.")
    elif origin is None and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(f"{where} is {_shown(value)}; it must be of type {_name(kind)}.")


def _shown(value: Any) -> str:
    """Return the value as Python code, shortened for a message."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to format an integer of more than 4,300 digits.
        text = "too long a number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name(kind: Any) -> str:
    """Return the type as Python code: 'tuple[tuple[str, float], ...]'."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _name(args[0])
    if origin is None:
        return "..." if kind is Ellipsis else kind.__name__
    return f"{origin.__name__}[{', '.join(map(_name, args))}]"


def _in_range(number: int | float, allowed: Range, where: str) -> int | float:
    if allowed.least <= number <= allowed.most:
        return number
    most = "" if allowed.most == math.inf else f" and at most {allowed.most}"
    raise UserError(f"{where} is {_shown(number)}; it must be at least {allowed.least}{most}.")


def _convert_dataclass(choices: tuple[type, ...], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; it must be a group of keys.")
    kind = choices[0] if len(choices) == 1 else _chosen(choices, value, where)
    hints = get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in hints:
            raise UnknownKeyError(where, key, kind if len(choices) > 1 else None)
    return kind(**{key: convert(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _chosen(choices: tuple[Any, ...], value: Mapping[str, Any], where: str) -> type:
    """Return the dataclass that `value["name"]` chooses, by default the first."""
    by_name = {choice.name: choice for choice in choices}
    name = value.get("name", choices[0].name)
    return by_name[convert(Literal[tuple(by_name)], name, f"{where}.name")]


def steps(duration: str, *, batch_size: int, examples_per_epoch: int) -> int:
    """Return the number of steps of a `Duration`, rounded down, and at most `MOST`."""
    match = _DURATION.fullmatch(duration)
    # `convert` has checked the format.
    assert match, duration
    amount, unit = float(match[1]), match[2]
    # The small addend keeps a product such as 0.29 * 100 from being rounded down to one step less.
    examples = {"step": batch_size, "epoch": examples_per_epoch, "example": 1}[unit]
    return int(min(amount * examples / batch_size + 1e-9, MOST))


def seconds(interval: str) -> float | None:
    """Return the seconds of an `Interval` that is a time on the clock, None for any other."""
    match = _TIME.fullmatch(interval)
    return match and float(match[1]) * {"second": 1, "minute": 60}[match[2]]


def step_range(text: str) -> range:
    """Return the steps of a `StepRange`, from the first to the last; none if it is backwards."""
    first, last = map(int, text.split(":"))
    return range(first, last + 1)


def changed_keys(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """Return the differing keys that change the result, as dotted key -> "key: old -> new"."""
    changes = {}
    for field in dataclasses.fields(old):
        # An optimizer of another name may lack the field; then the name says what differs.
        if not hasattr(new, field.name):
            continue
        key, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        # A resumed run may change keys that do not affect the result, such as those of the log.
        if not field.metadata.get("changes_result", True) or before == after:
            continue
        if dataclasses.is_dataclass(before):
            changes |= changed_keys(before, after, key + ".")
        else:
            changes[key] = f"{key}: {before!r} -> {after!r}"
    return changes
