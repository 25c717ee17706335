"""Make a `Config` from flags such as --config=configs/vit_bert.py:base --config.batch_size=1024."""

import os
import re
import runpy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from lit_jax.cli import CONFIG, set_key
from lit_jax.config import Config, parse
from lit_jax.config_schema import namesakes
from lit_jax.errors import UserError

# The folder of the recipes in the package, which are found by name.
RECIPES = Path(__file__).parent / "configs"


def load_config(spec: str, overrides: Iterable[tuple[str, str]]) -> Config:
    """Return the config from `get_config(arg)` of a file, with the (key, text) pairs of `overrides` applied.

    `spec` is "file.py", "file.py:arg", or the name of a recipe in the place of the file. Raises UserError if
    the file or the function is missing, if the function fails, and for a key or value that does not fit.
    """
    path, arg = _split(spec)
    config = _run(path, arg)
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config of {path} does not return a ConfigDict; start from lit_jax.config.default()."
        )
    raw = config.to_dict()
    # Set before parsing, so that a flag may also repair a value of the file.
    for key, text in overrides:
        set_key(raw, CONFIG, key, text)
    return parse(raw)


def _split(spec: str) -> tuple[Path, str]:
    """Return the file and the argument. Raise UserError if there is no such file."""
    # The first ".py" ends the path, because a colon may be part of a folder's name.
    file = re.match(r"(.*?\.py)(?::(.*))?$", spec, re.DOTALL)
    path, arg = (file[1], file[2] or "") if file else spec.partition(":")[::2]
    packaged = RECIPES / f"{path}.py"
    if file is None and "/" not in path and packaged.is_file() and not os.path.isfile(path):
        return packaged, arg
    if not os.path.isfile(path):
        what = "is not a file" if os.path.lexists(path) else "does not exist"
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.py")))
        raise UserError(
            f"The config file {path} {what}; give --config=FILE.py or FILE.py:ARGUMENT, or the name of a "
            f"recipe: {names}."
        )
    return Path(path), arg


def _run(path: Path, arg: str) -> Any:
    """Return the result of get_config(arg) of the file. Raise UserError for any error in the file."""
    # A config file may start from another file in its folder: `from my_configs import base`.
    folder = str(path.resolve().parent.parent)
    sys.path.insert(0, folder)
    try:
        # Not imported as a module, because two files of one name would then share an entry of sys.modules.
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(
                f"{path} has no function get_config(arg); add one, as the files in configs/ have it, or give "
                "another file."
            )
        return get_config(arg)
    except UserError:
        raise
    # A user's file may raise any exception.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, SystemExit):
            reason = f"it exits with {error.code!r}"
        raise UserError(
            f"get_config({arg!r}) of {path} fails: {reason[:500]}{_hint(error)}"
        ) from error
    finally:
        sys.path.remove(folder)


def _hint(error: BaseException) -> str:
    """Return a suggestion if the error is about a key that a ConfigDict does not have, else ''."""
    key = re.search(r"['\"](\w+)['\"]", str(error))
    if not isinstance(error, AttributeError | KeyError) or key is None:
        return ""
    keys = namesakes(Config, key[1])
    return f" (did you mean {' or '.join(map(repr, keys))}?)" if keys else ""


def parse_arg(
    arg: str, *, variants: tuple[str, ...], options: Mapping[str, type]
) -> tuple[str, dict[str, Any]]:
    """Return the variant and the options in a config's argument, as in --config=file.py:base,batch=1024.

    The first of `variants` is the default; `options` maps each name to its type. Raises UserError for
    anything else in the argument.
    """
    variant, given = None, {}
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if not equals and key in variants:
            if variant is not None:
                raise UserError(
                    f"{variant!r} and {key!r} are two variants of this config; give only one."
                )
            variant = key
        elif equals and key in options:
            try:
                given[key] = options[key](text)
            except ValueError:
                raise UserError(
                    f"{key} of a config is {text!r}; it must be of type {options[key].__name__}."
                ) from None
        else:
            known = (*variants, *(f"{name}=..." for name in options))
            raise UserError(
                f"{part!r} is not a variant of this config; known are {', '.join(known)}."
            )
    return variant or variants[0], given
