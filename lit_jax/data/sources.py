"""Where examples come from: the demo, a folder with captions.jsonl, or prepared TFDS data.

A source is random access and can be sent to worker processes.
"""

import functools
import json
import operator
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data import captions
from lit_jax.data.demo import PARALLEL, DemoSource, ParallelDemoSource
from lit_jax.data.example import Example, Source
from lit_jax.errors import UserError

CAPTIONS_FILE = "captions.jsonl"
TFDS_FILE = "features.json"


def open_source(config: SourceConfig, *, text_only: bool = False) -> Source:
    """The data set that `config` names, with the examples and captions that it chooses; never empty, and not
    without images unless it is for `text_only`.

    Raises UserError if it is missing, empty or broken, or has no such split.
    """
    return captions.choose(_open(config, text_only), config)


def _open(config: SourceConfig, text_only: bool) -> Source:
    folder = Path(config.path).expanduser()
    if config.path == "demo":
        return (
            ParallelDemoSource()
            if text_only and config.split == PARALLEL
            else DemoSource(config.split)
        )
    if (folder / CAPTIONS_FILE).is_file():
        return JsonlSource(folder, config.split, text_only=text_only)
    if (folder / TFDS_FILE).is_file():
        return TfdsSource(folder, config)
    raise UserError(
        f"There is no data set in {config.path!r}; a source's path (config.data.train.path to train) is "
        f"'demo', a folder with {CAPTIONS_FILE}, or the version folder of a prepared TFDS data set (it has "
        f"{TFDS_FILE})."
    )


class JsonlSource:
    """Pairs listed in captions.jsonl, one JSON object a line:

        {"image": "a.jpg", "caption": "a dog"}  or  {"image": ..., "captions": [...], "label": "dog"}
        or, by language,  {"image": ..., "captions": {"en": ["a dog"], "de": ["ein Hund"]}}

    "image" is a path, relative to the folder or absolute; "key", "label" and captions are optional. For a
    text tower that learns from a teacher a line needs no image, and "teacher_caption" says the same as its
    captions in the teacher's language (without it, the captions are in that language).
    Lines are found by their offsets and parsed when they are asked for: millions of them are no burden.
    """

    def __init__(self, folder: Path, split: str | None = None, *, text_only: bool = False):
        if split is not None:
            raise UserError(
                f"The data set in {folder} has no split {split!r}: {CAPTIONS_FILE} is one whole; "
                "leave out the split, or use another folder for each."
            )
        self._folder = folder
        self._text_only = text_only
        self._file = folder / CAPTIONS_FILE
        self._offsets = line_offsets(self._file)
        if not len(self._offsets):
            raise UserError(f"{self._file} is empty; it needs one JSON object a line.")
        self[0]  # a file of another format is better refused now than in a worker process

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Example:
        with self._file.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return self._parse(json.loads(line))
        except (ValueError, TypeError) as error:  # ValueError: not JSON, or not UTF-8
            number = self._line_number(index)
            raise UserError(
                f"Line {number} of {self._file} is no example ({error}); a line looks like "
                '{"image": "a.jpg", "caption": "a dog"}.'
            ) from error

    def _parse(self, row: Any) -> Example:
        if not isinstance(row, Mapping):
            raise TypeError("not a JSON object")
        image = _field(row, "image", str)
        if image is None and not self._text_only:
            raise TypeError('"image" is missing')
        texts, languages = _texts(row)
        if image is None and not texts:
            raise TypeError('"caption" is missing')
        return Example(
            key=_field(row, "key", str) or image or texts[0],
            image=None if image is None else self._folder / image,
            captions=texts,
            languages=languages,
            teacher_caption=_field(row, "teacher_caption", str),
            label=_field(row, "label", str),
        )

    def _line_number(self, index: int) -> int:
        with self._file.open("rb") as file:
            return file.read(self._offsets[index]).count(b"\n") + 1


def _texts(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The captions of a line, and where they are grouped by language the language of each."""
    first, captions = _field(row, "caption", str), _field(row, "captions", (list, Mapping)) or []
    if isinstance(captions, Mapping):
        if first is not None:
            raise TypeError('"caption" stands beside captions by language')
        groups = {k: [v] if isinstance(v, str) else v for k, v in captions.items()}
        texts = tuple(text for group in groups.values() for text in group)
        languages = tuple(language for language, group in groups.items() for _ in group)
    else:
        texts, languages = tuple(captions if first is None else [first, *captions]), None
    if not all(isinstance(text, str) for text in texts):
        raise TypeError('"captions" has an item that is no text')
    return texts, languages


def _field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """An optional field of a line; null counts as absent."""
    value = row.get(name)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f'"{name}" is {value!r}')
    return value


class TfdsSource:
    """A split of prepared TensorFlow Datasets data in ArrayRecord files; TensorFlow is not needed.

    Labels of a ClassLabel feature become the names of its classes. The captions may be one text or a
    sequence of them, also inside a sequence of groups ("captions/text" of coco_captions).
    """

    def __init__(self, folder: Path, config: SourceConfig):
        import tensorflow_datasets as tfds  # slow to import, and only this kind of data needs it

        try:
            builder: Any = tfds.builder_from_directory(folder)
        except Exception as error:  # of broken files it lets through whatever its parsers raise
            raise _damaged(folder, error) from error
        _check_split(builder.info.splits, config.split, folder)
        features = dict(builder.info.features.items())
        captions, *inside = config.caption_key.split("/")
        has_image = isinstance(features.get(config.image_key), tfds.features.Image)
        if not has_image or not {captions, config.label_key} & features.keys():
            raise UserError(
                f"{folder} needs an image feature {config.image_key!r}, and {captions!r} or "
                f"{config.label_key!r}, but has {', '.join(sorted(features))}; set image_key, "
                "caption_key and label_key of this source to names of features."
            )
        label = features.get(config.label_key)
        self._class_names = label.names if isinstance(label, tfds.features.ClassLabel) else None
        self._folder = folder
        self._image_key = config.image_key
        self._label_key = config.label_key if config.label_key in features else None
        self._caption_path = [captions, *inside] if captions in features else None
        self._split = config.split
        try:
            self._rows = builder.as_data_source(
                split=config.split, decoders={config.image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise UserError(
                f"{folder} has no ArrayRecord files; prepare the data set again with "
                "`tfds build --file_format=array_record`."
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        try:
            row = self._rows[index]
        except Exception as error:
            raise _damaged(self._folder, error) from error
        return Example(
            key=f"{self._split}/{index}",
            image=row[self._image_key],
            captions=self._captions(row),
            label=self._label(row),
        )

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self._caption_path is None:
            return ()
        texts = functools.reduce(operator.getitem, self._caption_path, row)
        return (_text(texts),) if isinstance(texts, bytes) else tuple(map(_text, texts))

    def _label(self, row: Mapping[str, Any]) -> str | None:
        if self._label_key is None:
            return None
        label = row[self._label_key]
        return self._class_names[label] if self._class_names else _text(label)


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 150)
    return UserError(
        f"The prepared data in {folder} is damaged ({reason}); prepare the data set again."
    )


def _check_split(splits: Mapping[str, Any], split: str | None, folder: Path) -> None:
    try:
        size = splits[split or ""].num_examples  # of "train[:10%]", too
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{folder} has no split {split!r}; its splits are {', '.join(sorted(splits))}."
        ) from error
    if not size:
        raise UserError(f"The split {split!r} of {folder} is empty; choose another one.")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def line_offsets(file: Path, block_bytes: int = 1 << 24) -> np.ndarray:
    """int64 offsets of a text file's lines, without blank ones and without a byte order mark."""
    offsets = [np.zeros(0, np.int64)]
    with file.open("rb") as stream:
        position = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
        stream.seek(position)
        rest = b""
        while block := stream.read(block_bytes):
            # A line may go on in the next block: only what the last line break ends is taken now.
            whole, line_break, rest = (rest + block).rpartition(b"\n")
            offsets.append(_starts(whole + line_break) + position)
            position += len(whole) + len(line_break)
        offsets.append(_starts(rest) + position)
    return np.concatenate(offsets)


def _starts(text: bytes) -> np.ndarray:
    """Where the lines of a text start that have more than white space."""
    if not text:
        return np.zeros(0, np.int64)
    values = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(values[:-1] == ord("\n"))
    starts = np.concatenate([[0], ends + 1])
    return starts[np.logical_or.reduceat(values > ord(" "), starts)]
