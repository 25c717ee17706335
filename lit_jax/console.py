"""How the commands speak: one line for what goes wrong, no noise for what goes well."""

import argparse
import functools
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import absl.logging

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
from lit_jax.printable import printable


def add_path(parser: argparse._ActionsContainer, flag: str, **options: Any) -> None:
    """Add a flag for a run folder, or for a file or folder to write; see `output_path`."""
    parser.add_argument(flag, type=functools.partial(output_path, flag), **options)


def command(main: Callable[..., None]) -> Callable[..., int]:
    """The exit code of `main`: 0, 2 after a UserError (one line on stderr), 75 after Preempted, 130 after
    Ctrl-C.

    A PermissionError is the user's, too: every path that is looked at comes from the flags or the config.
    LIT_JAX_TRACEBACK=1 in the environment shows the traceback of both. With several processes, all end with
    the code of the first that fails, or with 76 if it was killed.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        _set_up_logging()
        _set_up_output()
        try:
            main(*args, **kwargs)
        except (UserError, PermissionError) as error:
            if os.environ.get("LIT_JAX_TRACEBACK") == "1":
                traceback.print_exc()
            if isinstance(error, PermissionError):
                what = error.filename or "something that this command needs"
                error = f"There is no permission for {what}; get it, or give another path."
            process.end(BAD_INPUT, str(error))
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            return BAD_INPUT
        except Preempted as stop:
            print(stop, file=sys.stderr, flush=True)
            process.end(PREEMPTED)
            return PREEMPTED
        except GoneError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return GONE
        except KeyboardInterrupt:
            process.end(INTERRUPTED, "Interrupted.")
            print("Interrupted.", file=sys.stderr, flush=True)
            return INTERRUPTED
        except Exception as error:
            process.end(FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        process.end(DONE)
        return DONE

    return run


def _set_up_logging() -> None:
    """What lit_jax says goes to stderr as it is; of the libraries, warnings and worse."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Configs are checked here. What transformers says of them is about generating text, or a type of ours.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    own = logging.getLogger("lit_jax")
    own.setLevel(logging.INFO)
    own.propagate = False
    own.handlers = [logging.StreamHandler()]
    own.handlers[0].addFilter(_one_voice)
    own.handlers[0].setFormatter(_PrintableFormatter())


def _set_up_output() -> None:
    """Let stdout show what its encoding lacks as stderr does: \\xe9 for é in a terminal of ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what a notebook puts in its place
        sys.stdout.reconfigure(errors="backslashreplace")


class _PrintableFormatter(logging.Formatter):
    """A formatter that lets no control character of a file's or a caption's text reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _one_voice(record: logging.LogRecord) -> bool:
    """Of several processes the first alone says how it goes; warnings come from each, with its number."""
    number = process.number()
    if number is not None and record.levelno >= logging.WARNING:
        record.msg = f"process {number}: {record.msg}"
    return not number or record.levelno >= logging.WARNING
