"""The common part of the commands: flags, exit codes, and one line of text for each mistake."""

import argparse
import ast
import difflib
import errno
import functools
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from lit_jax import interrupts
from lit_jax.config import Config
from lit_jax.config_schema import UnknownKeyError, key_type, namesakes
from lit_jax.credentials import hide_keys
from lit_jax.display import printable, shown_streams
from lit_jax.distributed import process
from lit_jax.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    GONE,
    INTERRUPTED,
    PREEMPTED,
    GoneError,
    Preempted,
    UserError,
)
from lit_jax.files import output_path


class KeyFlags(NamedTuple):
    """The keys of a config dataclass as flags: --NAME.KEY=VALUE."""

    name: str
    root: type

    def split(self, words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
        """Return (key, text) of each --NAME.KEY=TEXT, and the other words. Raise UserError for no value."""
        prefix, pairs, others = f"--{self.name}.", [], []
        for word in words:
            key, equals, text = word.removeprefix(prefix).partition("=")
            if not word.startswith(prefix):
                others.append(word)
            elif equals:
                pairs.append((key, text))
            else:
                raise UserError(f"{word} has no value; write {word}=VALUE, without spaces.")
        return pairs, others


CONFIG = KeyFlags("config", Config)


class Parser(argparse.ArgumentParser):
    """A parser of flags that raises UserError instead of printing its usage.

    Args:
        module: the name of the module after `python -m`.
        text: the help text, which is the module's docstring.
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

    def parse(self, argv: Sequence[str] | None, keys: KeyFlags | None = None) -> argparse.Namespace:
        """Return the values of the flags. Raise UserError for a flag that the command does not have.

        With `keys` the message also suggests the key that a mistyped flag means.
        """
        words = get_words(argv)
        # Checked before argparse, which would only report that the intended flag is missing.
        for word in words:
            if word.startswith("--") and word.partition("=")[0] not in self.flags:
                raise UserError(unknown_flag(word, self.flags, keys))
        args, rest = self.parse_known(words)
        if rest:
            raise UserError(unknown_flag(rest[0], self.flags, keys))
        return args

    def parse_with_keys(
        self, argv: Sequence[str] | None, keys: KeyFlags = CONFIG
    ) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
        """Return the values of the flags, and (key, text) of each --NAME.KEY=TEXT."""
        pairs, words = keys.split(get_words(argv))
        return self.parse(words, keys), pairs

    def parse_known(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of the flags, and all words that this parser does not know."""
        return super().parse_known_args(get_words(argv))

    @property
    def flags(self) -> list[str]:
        """The long flags, each with its two dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


def add_path(parser: argparse._ActionsContainer, flag: str, **options: Any) -> None:
    """Add a flag for a run folder, or for a file or folder to write, which `output_path` checks."""
    parser.add_argument(flag, type=functools.partial(output_path, flag), **options)


def get_words(argv: Sequence[str] | None) -> Sequence[str]:
    """Return the words of the command line. Raise UserError for a word that is not valid text."""
    # Python turns undecodable bytes into half surrogates, which would fail later, when they are written.
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode(errors="backslashreplace").decode()
            raise UserError(f"{shown} cannot be read; {_remedy(word)}.") from None
    return words


def _remedy(word: str) -> str:
    # If the bytes are valid UTF-8, the word is fine and the locale is wrong.
    encoding = sys.getfilesystemencoding()
    try:
        os.fsencode(word).decode()
    except UnicodeError:
        return "it holds bytes that are not UTF-8: rename the file or folder"
    return f"this shell's encoding is {encoding}: set PYTHONUTF8=1 in the environment"


def unknown_flag(word: str, flags: Sequence[str], keys: KeyFlags | None = None) -> str:
    """Return the message about a word that is not a flag, with the most likely correction."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    sentence = f"{word} is not a flag of this command"
    if not word.startswith("-"):
        return f"{sentence}; write a flag and its value as --FLAG=VALUE, without spaces."
    flag = f"--{name}"
    # An underscore may stand for a dot: train_split means the key train.split.
    spellings = (name, name.replace("_", "."))
    found = (
        [path for key in spellings for path in namesakes(keys.root, key, keys.name)] if keys else []
    )
    if flag in flags or not found:
        close = difflib.get_close_matches(flag, flags, n=1)
        if close:
            return f"{sentence}; did you mean {close[0]!r}?"
    if found:
        # Both spellings may find the same key.
        named = dict.fromkeys(f"--{path}" for path in found)
        return f"{sentence}; did you mean {' or '.join(map(repr, named))}?"
    if keys:
        return f"{sentence}; a key is set by --{keys.name}.KEY=VALUE."
    return f"{sentence}; see --help."


def set_key(raw: dict[str, Any], keys: KeyFlags, key: str, text: str) -> None:
    """Set the value of a key in the nested dict `raw`, from its text on the command line.

    Members of dicts are added; all other keys must exist. Raises UserError for an unknown key.
    """
    path = key.split(".")
    try:
        kind = key_type(keys.root, path, keys.name)
    except UnknownKeyError as unknown:
        raise unknown.as_user_error(keys.root) from None
    group = raw
    for depth, name in enumerate(path[:-1], start=1):
        # A dict of the config may lack the member, such as a new evaluation.
        group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise UserError(
                f"{keys.name}.{'.'.join(path[:depth])} has a value and no keys of its own; set "
                f"{keys.name}.{'.'.join(path[:depth])} itself."
            )
    group[path[-1]] = _read_value(kind, text)


def _read_value(kind: Any, text: str) -> Any:
    """Return the Python value of `text`. Its type is checked later, when the config is parsed."""
    options = (
        typing.get_args(kind)
        if typing.get_origin(kind) in (types.UnionType, typing.Union)
        else (kind,)
    )
    if text == "None" and types.NoneType in options:
        return None
    # A text stays as it is: 'true' or '1e3' may be the name of a folder.
    if str in options or any(typing.get_origin(option) is typing.Literal for option in options):
        return text
    # A list of texts or numbers, but not of pairs, may be written with commas: en,de or 1,4,16.
    is_list = (
        typing.get_origin(kind) is tuple
        and typing.get_origin(typing.get_args(kind)[0]) is not tuple
    )
    try:
        value = ast.literal_eval(text)
        return (value,) if is_list and not isinstance(value, list | tuple) else value
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return [part.strip() for part in text.split(",")] if is_list else text


def command(main: Callable[..., None]) -> Callable[..., int]:
    """Return `main` as a function that returns an exit code.

    The code is 0 for success, 2 after a UserError (one line on stderr), 75 after Preempted, 76 if another
    process never connected, and 130 after Ctrl-C. An OSError about a path counts as a UserError, because
    every path comes from the flags or the config. LIT_JAX_TRACEBACK=1 in the environment adds the traceback.
    A process that fails exits at once; JAX then aborts the other processes of the run, which the scripts in
    launch/ turn into 76.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        with interrupts.raised(), shown_streams(process.number) as stdout:
            code = _exit_code(lambda: main(*args, **kwargs))
            stdout.flush()
            # A closed pipe (EPIPE) or terminal (EIO) is not an error, because its reader has seen enough; a
            # full disk is one.
            lost = stdout.error
            if code == DONE and lost is not None and lost.errno not in (errno.EPIPE, errno.EIO):
                _say(
                    f"stdout cannot be written ({lost.strerror}); the files that the command writes are "
                    "complete."
                )
                return BAD_INPUT
            return code

    return run


def _exit_code(main: Callable[[], None]) -> int:
    """Run `main`, print its error if there is one, and return the exit code."""
    try:
        main()
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        return PREEMPTED
    except GoneError as error:
        _say(str(error))
        return GONE
    except KeyboardInterrupt:
        return _interrupted()
    # argparse raises SystemExit after --help.
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else DONE
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None and interrupts.caused(error):
            return _interrupted()
        if sentence is None:
            # A single process shows Python's traceback of an unexpected error.
            if process.number() is None:
                raise
            _fail_among_others(error)
            return FAILED
        # An address in a message may have a secret key in it.
        sentence = hide_keys(sentence)
        if os.environ.get("LIT_JAX_TRACEBACK") == "1":
            print(hide_keys(traceback.format_exc()), end="", file=sys.stderr)
        _say(sentence)
        process.leave(BAD_INPUT)
        return BAD_INPUT
    return DONE


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr, flush=True)
    process.leave(INTERRUPTED)
    return INTERRUPTED


def _fail_among_others(error: Exception) -> None:
    """End one of several processes after an unexpected error, unless JAX ends it first.

    The error may only follow from the loss of another process, which JAX reports within a minute.
    """
    reason = hide_keys(" ".join(f"{type(error).__name__}: {error}".split()))
    _say(f"{reason[:300]}; JAX tells within a minute whether another process of the run is gone.")
    process.await_verdict()
    print(hide_keys(traceback.format_exc()), end="", file=sys.stderr)
    process.leave(FAILED)


# The errors of a path that the user can fix by giving another path.
_ABOUT_PATHS = {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
}


def _sentence(error: Exception) -> str | None:
    """Return the message for an error that the user can fix, or None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    what = error.filename or "something that this command needs"
    if isinstance(error, PermissionError):
        return f"There is no permission for {what}; change its permissions, or give another path."
    if error.errno in _ABOUT_PATHS:
        return f"{what} cannot be used ({error.strerror}); give another path."
    return None


def _say(sentence: str) -> None:
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
