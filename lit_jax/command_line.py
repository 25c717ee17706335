"""The flags of the commands: mistakes are one sentence, with the nearest flag or config key."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lit_jax.config import Config
from lit_jax.config_keys import namesakes
from lit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser of flags that raises UserError instead of printing its usage.

    Args:
        module: what stands behind `python -m`.
        text: the help, the module's docstring.
    """

    def __init__(self, module: str, text: str | None):
        super().__init__(
            prog=f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's own message."""
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the values of the flags. Raise UserError for a flag that the command does not have."""
        words = words_of(argv)
        for word in words:
            if word.startswith("--"):
                self.check(word)
        args, rest = self.parse_known(words)
        if rest:
            raise UserError(unknown_flag(rest[0], self.flags))
        return args

    def check(self, word: str, *, with_config: bool = False) -> None:
        """Raise UserError if a word that begins with two dashes is not one of the flags."""
        if word.partition("=")[0] not in self.flags:
            raise UserError(unknown_flag(word, self.flags, with_config=with_config))

    def parse_known(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of the flags, and the words that are none of this parser's."""
        return super().parse_known_args(words_of(argv))

    @property
    def flags(self) -> list[str]:
        """The flags, each with its two dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


def words_of(argv: Sequence[str] | None) -> Sequence[str]:
    """Return the command line. Raise UserError for a word that is not text."""
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode(errors="backslashreplace").decode()
            raise UserError(f"{shown} cannot be read; {_remedy(word)}.") from None
    return words


def _remedy(word: str) -> str:
    encoding = sys.getfilesystemencoding()
    try:
        os.fsencode(word).decode()
    except UnicodeError:
        return "it holds bytes that are not UTF-8: rename the file or folder"
    return f"this shell's encoding is {encoding}: set PYTHONUTF8=1 in the environment"


def unknown_flag(word: str, flags: Sequence[str], *, with_config: bool = False) -> str:
    """Return the sentence about a word that is not a flag."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    sentence = f"{word} is not a flag of this command"
    if not word.startswith("-"):
        return f"{sentence}; write a flag and its value as --FLAG=VALUE, without a blank."
    flag = f"--{name}"
    keys = namesakes(Config, name) if with_config else []
    if flag in flags or not keys:
        close = difflib.get_close_matches(flag, flags, n=1)
        if close:
            return f"{sentence}; did you mean {close[0]!r}?"
    if keys:
        return f"{sentence}; did you mean {' or '.join(repr(f'--{key}') for key in keys)}?"
    if with_config:
        return f"{sentence}; a config key is set by --config.KEY=VALUE."
    return f"{sentence}; see --help."
