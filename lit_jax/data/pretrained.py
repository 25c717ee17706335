"""Tokenizers and image processors of transformers, read from a folder whose code is never run."""

import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

from lit_jax.errors import UserError

# transformers' own words where a package is missing that it has a name for.
_REQUIRES = re.compile(r"requires the (\w+) library")
# The packages that read a vocabulary of sentencepiece, by the names of their modules.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def read_pretrained(auto_class: Any, folder: Path, what: str, advice: str, **options: Any) -> Any:
    """Return what an Auto class of transformers reads from `folder`.

    Args:
        what: names it in messages, such as "The tokenizer in FOLDER".
        advice: says what to do about a file that is broken.
    """
    try:
        # Left out, transformers asks on the terminal, where `yes |` answers for the user.
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)
    # transformers lets through whatever a broken file raises.
    except Exception as error:
        if _asks_for_code(auto_class, folder):
            raise _is_code(what) from error
        absent = [name for name in _SENTENCEPIECE if not _is_installed(name)]
        if absent and [*folder.glob("*.model")]:
            # transformers then tries to read the file as one of tiktoken, and reports that.
            error = ImportError(str(error), name=absent[0])
        raise unusable(error, what, advice) from error


def unusable(error: Exception, what: str, advice: str) -> UserError:
    """Return the sentence for an error of transformers about `what`."""
    if package := missing_package(error):
        return UserError(
            f"{what} needs the package {package}, which is not installed; run pip install {package}."
        )
    return UserError(f"{what} cannot be used ({textwrap.shorten(str(error), 150)}); {advice}")


def _asks_for_code(auto_class: Any, folder: Path) -> bool:
    """Return whether a config in the folder names a class of its own (auto_map) instead of `auto_class`."""
    files = folder.glob("*config.json")
    name = f'"{auto_class.__name__}"'
    return any(name in file.read_text(encoding="utf-8", errors="replace") for file in files)


def _is_code(what: str) -> UserError:
    return UserError(
        f"{what} is Python code of its own (auto_map), which lit_jax never runs; use one of a class that "
        "transformers has."
    )


def missing_package(error: BaseException | None) -> str | None:
    """Return the package to install if an import is the cause of `error`."""
    while error is not None:
        if isinstance(error, ImportError):
            if error.name:
                return _SENTENCEPIECE.get(error.name, error.name.partition(".")[0])
            if match := _REQUIRES.search(str(error)):
                return match[1].lower()
        error = error.__cause__ or error.__context__
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    # The package of the module is missing.
    except ModuleNotFoundError:
        return False
