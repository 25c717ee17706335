"""From the command line to a `Config`: --config=configs/vit_bert.py:base --config.batch_size=1024"""

import ast
import dataclasses
import runpy
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from lit_jax.config import Config, nearest, parse
from lit_jax.errors import UserError

PREFIX = "--config."


def load_config(spec: str, overrides: Iterable[tuple[str, str]]) -> Config:
    """Runs `get_config(arg)` of the file in `spec` ("file.py" or "file.py:arg") and changes some keys.

    Raises UserError if there is no such file or function, if it fails, and on a key or value that does
    not fit.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"There is no config file {path}; give --config=FILE.py or FILE.py:ARGUMENT."
        )
    # One config may start from another: `from configs import vit_bert`.
    sys.path.insert(0, str(Path(path).resolve().parent.parent))
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no function get_config(arg); give a config file.")
        config = get_config(arg)
    except UserError:
        raise
    except Exception as error:  # whatever somebody's file may raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"get_config({arg!r}) of {path} fails: {reason}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config of {path} returns no ConfigDict; start from lit_jax.config.default()."
        )
    raw = config.to_dict()
    for key, text in overrides:
        _override(raw, key.split("."), text)
    return parse(raw)


def split_overrides(args: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text) of arguments of the form --config.KEY=VALUE. Raises UserError on any other."""
    for arg in args:
        if not arg.startswith(PREFIX) or "=" not in arg:
            raise UserError(
                f"{arg} is no flag of this command; a config key is set by {PREFIX}KEY=VALUE."
            )
    pairs = (arg.removeprefix(PREFIX).partition("=") for arg in args)
    return [(key, text) for key, _, text in pairs]


def _override(raw: dict[str, Any], keys: list[str], text: str) -> None:
    """Sets the value at `keys`. `raw` is complete but for what is `dict` in Config: all else must exist."""
    kind: Any = Config
    group = raw
    for depth, key in enumerate(keys):
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            if key not in hints:
                where = ".".join(("config", *keys[:depth], key))
                raise UserError(f"{where} is not a config key; {nearest(key, hints)}.")
            kind = hints[key]
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any
        if depth + 1 < len(keys):
            group = group.setdefault(key, {})
            if not isinstance(group, dict):
                raise UserError(f"config.{'.'.join(keys[: depth + 1])} has no keys of its own.")
    group[keys[-1]] = _read(kind, text)


def _read(kind: Any, text: str) -> Any:
    """The Python value that `text` stands for; `parse` checks its type afterwards."""
    options = (
        typing.get_args(kind)
        if typing.get_origin(kind) in (types.UnionType, typing.Union)
        else (kind,)
    )
    if text == "None" and types.NoneType in options:
        return None
    if str in options or any(typing.get_origin(option) is typing.Literal for option in options):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
