"""The check of the fields of a config.json: types by the families' dataclasses, limits by the field's name.

Python itself seldom rejects a value of another type: the text "false" counts as true, and 2.0 blocks fail
only where a loop counts them.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from lit_jax.errors import UserError
from lit_jax.models.patches import patch_grid

# Returns the name of a field in a message: a key of the config, or a field of a file.
Named = Callable[[str], str]

# An integer field is a size of at least 1, except token ids, which may be any integer, and the fields that
# may be 0.
_TOKENS = ("pad_token_id", "eos_token_id")
_FROM_ZERO = ("type_vocab_size", "num_register_tokens", "depthwise_padding")
# The names of fields whose value is a probability or a share, from 0 to 1.
_PROBABILITY = re.compile(r".*(dropout|dropout_prob|drop_path_rate|drop_connect_rate|momentum)")
# (width, count that must divide the width), by the names that the transformers' configs use.
_DIVIDED = (("hidden_size", "num_attention_heads"), ("dim", "n_heads"))
# The lists of a config that must have one entry for each stage.
_STAGES = (
    ("hidden_sizes", "depths"),
    (
        "kernel_sizes",
        "in_channels",
        "out_channels",
        "strides",
        "num_block_repeats",
        "expand_ratios",
    ),
)


class _UnfitError(Exception):
    """An error that says that a value is not of the type of its field."""


def in_config_json(name: str) -> str:
    """Return the name of a field of a config.json for messages."""
    return f"{name} in the model's config.json"


def read_fields(config_class: type[Any], hf: Mapping[str, Any], named: Named) -> dict[str, Any]:
    """Return the fields of `config_class` that `hf` has, hashable and of their annotated types.

    A config must be hashable, because linen modules with this config are static arguments of `jax.jit`.
    Raises UserError for a value of another type and for a number out of its limits; `named` gives the name.
    """
    hints = typing.get_type_hints(config_class)
    return {name: _read(name, hf[name], hint, named) for name, hint in hints.items() if name in hf}


def check_sizes(config: Any, named: Named) -> None:
    """Raise UserError where sizes that are valid one by one do not fit each other."""
    for width, parts in _DIVIDED:
        whole, count = getattr(config, width, None), getattr(config, parts, None)
        if whole is not None and count is not None and whole % count:
            raise UserError(
                f"{named(parts)} is {count}, which does not divide {named(width)}, {whole}; change one of "
                "the two."
            )
    for names in _STAGES:
        lengths = {name: len(getattr(config, name)) for name in names if hasattr(config, name)}
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"{', '.join(map(named, lengths))} have {', '.join(map(str, lengths.values()))} entries; "
                "give each of them one entry for each stage."
            )
    stages, depths = getattr(config, "num_stages", 0), getattr(config, "depths", ())
    if stages > len(depths):
        raise UserError(
            f"{named('num_stages')} is {stages}, and {named('depths')} has {len(depths)} entries; give as "
            "many entries as stages, or lower the number of stages."
        )
    # RoBERTa's positions start after the padding id, so a short table may have no position left.
    embedding = getattr(config, "embedding", None)
    if embedding is not None and embedding.max_length < 1:
        raise UserError(
            f"{named('max_position_embeddings')} is {config.max_position_embeddings}, which leaves no "
            f"position after {named('pad_token_id')}, {config.pad_token_id}; make it larger."
        )
    _check_patches(config, named)


def _check_patches(config: Any, named: Named) -> None:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is not None and patch is not None and 0 in patch_grid(image, patch):
        raise UserError(
            f"{named('image_size')} is {image}, less than {named('patch_size')}, {patch}; make the image at "
            "least as large as a patch."
        )


def _read(name: str, value: Any, hint: Any, named: Named) -> Any:
    try:
        read = _typed(value, hint)
    except _UnfitError:
        raise UserError(f"{named(name)} is {value!r}; it must be {_expected(hint)}.") from None
    for number in read if isinstance(read, tuple) else (read,):
        # bool is a subclass of int, but has no limits.
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_limits(name, number, named)
    return read


def _typed(value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type. Raise _UnfitError if it does not fit.

    JSON has no tuples, and its 0 may mean 0.0.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _hashable(value)
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if origin in (types.UnionType, typing.Union):
        # The first arm that fits wins, so an int stays an int under `int | float`.
        for arm in args:
            try:
                return _typed(value, arm)
            except _UnfitError:
                continue
    # A field of (name, value) pairs is a hashable dict, such as ModernBERT's rope_parameters.
    elif origin is tuple and isinstance(value, Mapping):
        if args[-1] is Ellipsis and get_origin(args[0]) is tuple:
            return _hashable(value)
    elif origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_typed(item, args[0]) for item in value)
        if len(args) == len(value):
            return tuple(_typed(item, arm) for item, arm in zip(value, args, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # json.loads accepts NaN and Infinity. The comparison rejects both.
        if abs(value) < math.inf:
            return float(value)
    # True must not pass as an int, nor 1 as a bool.
    elif origin is None and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise _UnfitError


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, Mapping):
        # Sorted keys make equal dicts equal tuples.
        return tuple((str(key), _hashable(value[key])) for key in sorted(value, key=str))
    return value


def _check_limits(name: str, number: int | float, named: Named) -> None:
    if name in _TOKENS:
        return
    is_count = isinstance(number, int) and name not in _FROM_ZERO
    least, most = (0, 1) if _PROBABILITY.fullmatch(name) else (int(is_count), math.inf)
    if not least <= number <= most:
        limits = f"at least {least}" + ("" if most == math.inf else f" and at most {most}")
        raise UserError(f"{named(name)} is {number}; it must be {limits}.")


def _expected(hint: Any) -> str:
    """Return the description of the annotated type for a message."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return f"of type {name}" + (" (True or False)" if hint is bool else "")
