"""A list of rows in a JSON file, the format of BLIP and LLaVA: [{"image": "a.jpg", "caption": "a dog"}]."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from lit_jax.data.files import File, read, read_text, require_regular
from lit_jax.errors import UserError

# The bytes at the start of a file that are searched for the key of an image.
_HEAD_BYTES = 1 << 16
_LIST = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*\{\s*"')
# The usual keys of the image, besides the key that the config names.
_IMAGE_KEYS = ("image", "file_name")
_SPACE = re.compile(r"[ \t\r\n]*")


def is_list_of_rows(file: File, image_key: str) -> bool:
    """Return whether a JSON file is a list of objects, and one of the first objects names an image."""
    require_regular([file])
    head = read(file, 0, _HEAD_BYTES)
    # A file may contain letters beyond ASCII as they are, or escaped. The file may be gigabytes long, so its
    # start is searched instead of parsed.
    keys = [
        re.escape(json.dumps(key, ensure_ascii=is_escaped)).encode()
        for key in (*_IMAGE_KEYS, image_key)
        for is_escaped in (True, False)
    ]
    has_image = re.search(rb"(%s)\s*:" % b"|".join(keys), head)
    return _LIST.match(head) is not None and has_image is not None


class JsonItems:
    """The items of a JSON list, with the interface of `Lines`. Only the offsets are kept in memory.

    Raises UserError if the list is empty, or if the file is not a JSON list.
    """

    def __init__(self, file: File):
        self.file = file
        try:
            # The text comes without the mark, but rows are read by their place in the file.
            mark = read(file, 0, len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            self._bounds_Nx2 = _bounds(read_text(file)) + mark * len(codecs.BOM_UTF8)
        except ValueError as error:
            raise UserError(
                f"{file} cannot be read as a JSON list of rows ({error}); correct it, or download it again."
            ) from error
        if not len(self):
            raise UserError(f"{file} is an empty list; write a row for each example.")

    def __len__(self) -> int:
        return len(self._bounds_Nx2)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read(self.file, *self._bounds_Nx2[index].tolist())

    def blocks(self, start: int = 0) -> Iterator[list[bytes]]:
        """Yield all items from `start` on, in order, in lists of at most 10,000; read the file once."""
        content = self.file.read_bytes()
        bounds = iter(self._bounds_Nx2[start:].tolist())
        while block := [content[a:b] for a, b in itertools.islice(bounds, 10_000)]:
            yield block

    def place(self, index: int) -> str:
        """Return the name of an item for messages."""
        return f"item {index} of {self.file}"


def _bounds(text: str) -> np.ndarray:
    """Return the bytes at which each item of a JSON list starts and stops, int64 Nx2.

    Raises ValueError if the text is not a JSON list.
    """
    # The decoder parses one item at a time, whose value is thrown away: `json.loads` gives no offsets.
    decoder, ends = json.JSONDecoder(), []
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        raise ValueError("it does not begin with [")
    place = _after_space(text, place + 1)
    is_open = text[place : place + 1] != "]"
    while is_open:
        try:
            _, stop = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError(
                f"the brackets of item {len(ends) // 2}, at character {place}, are nested too deep"
            ) from None
        ends += [place, stop]
        place = _after_space(text, stop)
        is_open = text[place : place + 1] == ","
        place = _after_space(text, place + 1) if is_open else place
    # Trailing text usually means a truncated or concatenated file.
    if text[place:].strip() != "]":
        raise ValueError(f"neither a comma nor the end after item {len(ends) // 2 - 1}")
    # The decoder counts characters, and a file is read by bytes.
    lengths = [len(text[a:b].encode()) for a, b in itertools.pairwise([0, *ends])]
    return np.cumsum(lengths, dtype=np.int64).reshape(-1, 2)


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place
