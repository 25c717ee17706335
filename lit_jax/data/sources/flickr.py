"""Captions of Flickr8k and Flickr30k, in the file formats in which they are distributed.

1000268201.jpg#0<tab>A child in a pink dress .           *.token, Flickr8k.token.txt
image,caption  /  image_name,comment_number,comment      captions.txt
image_name| comment_number| comment                      results.csv
"""

import collections
import csv
import logging
import re
from collections.abc import Iterator, Sequence

from lit_jax.data.files import File, read, read_text, require_regular
from lit_jax.data.image import IMAGE_SUFFIXES
from lit_jax.data.sources.lists import ListedSource, captioned, parsing

log = logging.getLogger(__name__)

# The second vertical bar is optional, because it is missing in one line of the distributed file.
_BARS = re.compile(r"(?P<name>[^|]+?)\s*\|\s*[0-9]+\s*\|?\s*(?P<caption>.*)")
_TAB = re.compile(r"(?P<name>[^\t]+?)(?:#[0-9]+)?\t(?P<caption>.*)")


def has_bars(file: File) -> bool:
    """Return whether a table begins like results.csv of Flickr30k."""
    require_regular([file])
    return re.match(rb"(\xef\xbb\xbf)?\s*image_name\s*\|", read(file, 0, 64)) is not None


def open_flickr(file: File) -> ListedSource:
    """Return the images that a file lists, each with all its captions.

    Lines without an image and a caption are counted in a warning. Raises UserError if no line has both.
    """
    listed, unread = collections.defaultdict(list), []
    with parsing(file):
        text = read_text(file).replace("\r\n", "\n")
        # Lines may end with a carriage return alone; see `DelimitedSource`.
        for line, found in _rows(text if "\n" in text else text.replace("\r", "\n")):
            # A few broken lines are normal in distributed copies, so they are counted and not fatal.
            if found:
                name, caption = found
                listed[name].append(caption)
            else:
                unread.append(line)
        if not listed:
            raise ValueError("no line has an image and a caption")
    if unread:
        log.warning(
            "%d lines of %s have no image with a caption and are left out, the first: %.100r.",
            len(unread),
            file,
            unread[0],
        )
    return captioned(file, listed)


def _rows(text: str) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Yield each line with (image, caption), or with None if the line has no image and caption."""
    # Not `splitlines`, which would also split captions at separators such as U+2028.
    lines = [*filter(str.strip, text.split("\n"))]
    first = lines[0] if lines else ""
    if "\t" in first or "|" in first:
        yield from _matched(lines, _TAB if "\t" in first else _BARS)
        return
    has_header = not _is_image(first.split(",")[0])
    # Some copies do not quote captions with commas. The caption is the last column, so all fields from there
    # on are joined.
    before = first.count(",") if has_header else 1
    for line in lines:
        fields = _fields(line)
        if len(fields) > before > 0 and _is_image(fields[0]):
            yield line, (fields[0].strip(), ",".join(fields[before:]).strip())
        elif not has_header or line != first:
            yield line, None


def _matched(
    lines: Sequence[str], pattern: re.Pattern[str]
) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Yield each line as `_rows` does, without the first line if it names the columns."""
    matches = [pattern.fullmatch(line) for line in lines]
    names = [match["name"] if match else "" for match in matches[:2]]
    has_header = not names[0] or (not _is_image(names[0]) and any(map(_is_image, names[1:])))
    for line, match in [*zip(lines, matches, strict=True)][has_header:]:
        yield line, (match["name"].strip(), match["caption"].strip()) if match else None


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    # The quotes are part of a caption that is not quoted.
    except csv.Error:
        return line.split(",")


def _is_image(field: str) -> bool:
    return field.strip().lower().endswith(IMAGE_SUFFIXES)
