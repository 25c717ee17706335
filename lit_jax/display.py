"""Show text: make it printable, write it to streams that may be closed, full or ASCII, and log it."""

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

import absl.logging

from lit_jax.credentials import hide_keys

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The most characters of an error in a message.
_LONGEST_REASON = 400
# The white space among the control characters, and Unicode's two separators that also end a line.
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
# Control characters, and two code points that XML, and so SVG, does not allow, apart from surrogates.
_NOT_PRINTABLE = [*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF]
_TABLE = dict.fromkeys(_NOT_PRINTABLE, _REPLACEMENT) | dict.fromkeys(map(ord, _SPACES), " ")


def valid_unicode(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot encode.

    Cutting an emoji leaves such a half in JSON, and so does a file name that is not UTF-8. Two adjacent
    halves become their character.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Return the text as one line that UTF-8, XML and a terminal can show.

    White space among the control characters becomes a space; every other control character, and each half of
    a surrogate pair, becomes U+FFFD. Everything else stays, including characters without width and those that
    change the direction of writing.
    """
    return valid_unicode(text).translate(_TABLE)


def kind_of(value: object) -> str:
    """Return what a value is, for messages: a class or function by its name, any other value by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__} and not an object of it"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', value)}"
    return f"of type {type(value).__name__}"


def without_details(reason: object) -> str:
    """Return the text of an error without the details that Google's client appends, which fill a page."""
    return str(reason).partition(" error_info=")[0][:_LONGEST_REASON]


class Stream:
    """A text stream that never fails: a training run must not end because its output cannot be written.

    Attributes:
        error: the first error of the underlying stream, which gets no more output after the error.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write a text, with escapes for characters that the encoding lacks; return its length."""
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
        """Flush the underlying stream, and note an error instead of raising it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        # The underlying stream provides encoding, isatty, fileno, buffer and the rest.
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # The rest of the buffer would fail again, at the latest when Python exits, with code 120. The
        # descriptor is redirected, because C++ libraries write to it, too.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def shown_streams(number: Callable[[], int | None]) -> Iterator[Stream]:
    """Set up streams and logging for a command, and yield its stdout; restore them at the end.

    `number` returns this process's number among several, or None for a single process.
    """
    _open_closed_descriptors()
    # sys.stdout and sys.stderr are None if the shell has closed them.
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
    """Open closed standard descriptors, so that no file gets their numbers, to which libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system assigns the lowest free number, which is this descriptor.
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def _encodable(stream: Any) -> Iterator[None]:
    r"""Let a stream escape the characters that its encoding lacks: \xe9 for é in ASCII."""
    # A notebook's stream cannot be reconfigured.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:
        yield
        return
    before = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        # A ValueError means that the stream has been closed meanwhile.
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
    # lit_jax checks configs itself; transformers only warns about text generation, or about our own types.
    configs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)
        own.setLevel(before[0])
        configs.setLevel(before[3])
        _, own.propagate, own.handlers, _ = before


class _PrintableFormatter(logging.Formatter):
    """A formatter that keeps secret keys and control characters from the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, hide_keys(super().format(record)).split("\n")))


def _primary_only(number: Callable[[], int | None], record: logging.LogRecord) -> bool:
    """Return whether to show a record: the first process shows all records, the others only warnings.

    A warning gets the number of its process if there are several.
    """
    index = number()
    if index is not None and record.levelno >= logging.WARNING:
        record.msg = f"process {index}: {record.msg}"
    return not index or record.levelno >= logging.WARNING
