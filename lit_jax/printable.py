"""Texts of users, made fit for pages, figures, tables and terminals."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# White space among the control characters, and the two separators that end a line as they do.
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
# Control characters, and the two code points beside surrogates that XML, and so SVG, does not allow.
_NOT_PRINTABLE = [*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF]
_TABLE = dict.fromkeys(_NOT_PRINTABLE, _REPLACEMENT) | dict.fromkeys(map(ord, _SPACES), " ")


def valid_unicode(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which has no form in UTF-8.

    A cut through an emoji leaves such a half in JSON, and so does a file name that is not UTF-8. Two halves
    that stand together become the character that they make.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Return the text as one line that UTF-8, XML and a terminal can show.

    White space that ends a line becomes a space, every other control character and each half of a surrogate
    pair U+FFFD. All else stays, also what has no width or turns the direction of writing.
    """
    return valid_unicode(text).translate(_TABLE)
