"""Text that is shown: made printable, on streams that may be closed, full or of ASCII, and as log records."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

import absl.logging

from lit_jax.credentials import hide_keys

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# White space among the control characters, and the two separators that end a line as they do.
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
# Control characters, and the two code points beside surrogates that XML, and so SVG, does not allow.
_NOT_PRINTABLE = [*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF]
_TABLE = dict.fromkeys(_NOT_PRINTABLE, _REPLACEMENT) | dict.fromkeys(map(ord, _SPACES), " ")


def valid_unicode(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot hold.

    A cut through an emoji leaves such a half in JSON, and so does a file name that is not UTF-8. Two halves
    that stand together become their character.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Return the text as one line that UTF-8, XML and a terminal can show.

    White space that ends a line becomes a space, every other control character and each half of a surrogate
    pair U+FFFD. All else stays, also characters without width or that turn the direction of writing.
    """
    return valid_unicode(text).translate(_TABLE)


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
        # encoding, isatty, fileno, buffer ... are those of the stream below.
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # The rest of the buffer would fail again, at the latest when Python ends, with exit code 120. C++
        # libraries write to the same descriptor.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def shown_streams(number: Callable[[], int | None]) -> Iterator[Stream]:
    """Set up streams and logging for a command, and yield its stdout; restore them at the end.

    `number` returns this process's number among several, None if it is the only one.
    """
    _open_closed_descriptors()
    # A stream that was closed is replaced by one to nowhere.
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output = Stream(sys.stdout or nowhere)
        errors = Stream(sys.stderr or nowhere)
        with (
            contextlib.redirect_stdout(cast(TextIO, output)),
            contextlib.redirect_stderr(cast(TextIO, errors)),
            _encodable(output),
            _encodable(errors),
            _logging(number),
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
            # It gets the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def _encodable(stream: Any) -> Iterator[None]:
    r"""Let a stream show characters that its encoding lacks by their number: \xe9 for é in ASCII."""
    # A notebook's stream cannot be changed.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:
        yield
        return
    before = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        # ValueError: the stream was closed meanwhile.
        with contextlib.suppress(ValueError):
            reconfigure(errors=before)


@contextlib.contextmanager
def _logging(number: Callable[[], int | None]) -> Iterator[None]:
    """Show all messages of lit_jax on stderr, and the warnings and errors of libraries."""
    own, configs = map(logging.getLogger, ("lit_jax", "transformers.configuration_utils"))
    before = own.level, own.propagate, own.handlers, configs.level
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.WARNING)
    handler = logging.StreamHandler()
    handler.addFilter(functools.partial(_primary_only, number))
    handler.setFormatter(_PrintableFormatter())
    own.setLevel(logging.INFO)
    own.propagate, own.handlers = False, [handler]
    # lit_jax checks configs itself; transformers' warnings are about generating text, or about types of ours.
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


def _primary_only(number: Callable[[], int | None], record: logging.LogRecord) -> bool:
    """Return whether to show a record: the first process shows all, any other only its warnings.

    A warning of one among several processes gets its number.
    """
    index = number()
    if index is not None and record.levelno >= logging.WARNING:
        record.msg = f"process {index}: {record.msg}"
    return not index or record.levelno >= logging.WARNING
