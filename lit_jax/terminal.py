"""What a command shows, on streams that may be closed, full or of ASCII; all is as before when it ends."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

import absl.logging

from lit_jax.credentials import hide_keys
from lit_jax.distributed import process
from lit_jax.printable import printable


class Stream:
    """A text stream that never fails: a training does not end because nobody reads what it prints.

    Attributes:
        error: the first error of the stream below, which gets nothing more from then on.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str, /) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(
                text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            )
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        # All else is that of the stream: encoding, isatty, fileno, buffer ...
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # What is left in the buffer would fail again, at the latest when Python ends, with exit code 120. C++
        # libraries write to the same descriptor.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def prepared() -> Iterator[Stream]:
    """Set up streams and logging for a command, and give its stdout; restore them at the end."""
    _open_closed_descriptors()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # for a stream that was closed
        output = Stream(sys.stdout or nowhere)
        errors = Stream(sys.stderr or nowhere)
        with (
            contextlib.redirect_stdout(cast(TextIO, output)),
            contextlib.redirect_stderr(cast(TextIO, errors)),
            _encodable(output),
            _encodable(errors),
            _logging(),
        ):
            yield output
            output.flush()
            errors.flush()


def _open_closed_descriptors() -> None:
    """Let no file that is opened later become stdout or stderr, to which libraries write as they like."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


@contextlib.contextmanager
def _encodable(stream: Any) -> Iterator[None]:
    """Let a stream show what its encoding lacks by its number: \\xe9 for é in a terminal of ASCII."""
    reconfigure = getattr(stream, "reconfigure", None)  # not what a notebook puts in its place
    if reconfigure is None:
        yield
        return
    before = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # closed meanwhile
            reconfigure(errors=before)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Show what lit_jax says on stderr as it is; of the libraries, warnings and worse."""
    own, configs = map(logging.getLogger, ("lit_jax", "transformers.configuration_utils"))
    before = own.level, own.propagate, own.handlers, configs.level
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.WARNING)
    handler = logging.StreamHandler()
    handler.addFilter(_one_voice)
    handler.setFormatter(_PrintableFormatter())
    own.setLevel(logging.INFO)
    own.propagate, own.handlers = False, [handler]
    # Configs are checked here. What transformers says of them is about generating text, or a type of ours.
    configs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)
        own.setLevel(before[0])
        configs.setLevel(before[3])
        _, own.propagate, own.handlers, _ = before


class _PrintableFormatter(logging.Formatter):
    """A formatter that lets no key and no control character of a text reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, hide_keys(super().format(record)).split("\n")))


def _one_voice(record: logging.LogRecord) -> bool:
    """Return whether to show a record: of several processes the first alone says how it goes.

    Warnings come from each, with its number.
    """
    number = process.number()
    if number is not None and record.levelno >= logging.WARNING:
        record.msg = f"process {number}: {record.msg}"
    return not number or record.levelno >= logging.WARNING
