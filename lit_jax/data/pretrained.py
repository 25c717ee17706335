"""Load tokenizers and image processors of transformers from a folder, without running the folder's code."""

import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

from lit_jax.errors import UserError
from lit_jax.files import refuse_lfs_pointer

# The message of transformers about a missing package, whose exception has no `name`.
_REQUIRES = re.compile(r"requires the (\w+) library")
# Module -> package that is needed to read a sentencepiece vocabulary.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def read_pretrained(auto_class: Any, folder: Path, what: str, advice: str, **options: Any) -> Any:
    """Return the object that an Auto class of transformers reads from `folder`.

    Args:
        what: the object's name in messages, such as "The tokenizer in FOLDER".
        advice: the rest of the message, which says what to do about a broken file.

    Raises UserError if the object cannot be read, needs a missing package, or is code in the folder.
    """
    try:
        # Without an explicit False, transformers asks on the terminal, where `yes |` would answer.
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)
    # A broken file can raise any exception inside transformers.
    except Exception as error:
        # A clone without Git LFS is a common cause, and the message of transformers names another.
        for file in sorted(folder.iterdir()):
            if file.is_file():
                refuse_lfs_pointer(file)
        if _asks_for_code(auto_class, folder):
            raise _is_code(what) from error
        absent = [name for name in _SENTENCEPIECE if not _is_installed(name)]
        vocabularies = sorted(folder.glob("*.model"))
        reason: Exception = error
        # If sentencepiece is missing, or cannot read the file, transformers reads the file as tiktoken's and
        # reports that failure.
        if vocabularies and absent:
            reason = ImportError(str(error), name=absent[0])
        elif vocabularies and missing_package(error) == "tiktoken":
            reason = ValueError(f"{vocabularies[0].name} is not a vocabulary of sentencepiece")
        raise unusable(reason, what, advice) from error


def unusable(error: Exception, what: str, advice: str) -> UserError:
    """Return the UserError for an error of transformers about `what`."""
    if package := missing_package(error):
        return UserError(
            f"{what} needs the package {package}, which is not installed; run pip install {package}."
        )
    return UserError(f"{what} cannot be used ({textwrap.shorten(str(error), 150)}); {advice}")


def _asks_for_code(auto_class: Any, folder: Path) -> bool:
    """Return whether a config in the folder maps `auto_class` to a class of its own (auto_map)."""
    files = folder.glob("*config.json")
    name = f'"{auto_class.__name__}"'
    return any(name in file.read_text(encoding="utf-8", errors="replace") for file in files)


def _is_code(what: str) -> UserError:
    return UserError(
        f"{what} needs Python code from its own folder (auto_map), which lit_jax never runs; use one whose "
        "class is part of transformers."
    )


def missing_package(error: BaseException | None) -> str | None:
    """Return the package to install if a failed import is the cause of `error`, else None."""
    # transformers may raise another exception from the ImportError, so the chain is followed.
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
    # For "google.protobuf", `find_spec` raises if "google" itself is missing.
    except ModuleNotFoundError:
        return False
