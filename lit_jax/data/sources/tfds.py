"""Prepared TensorFlow Datasets data."""

import functools
import operator
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.sources.splits import not_found
from lit_jax.errors import UserError


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
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            row = self._rows[index]
        except Exception as error:  # of a broken shard it lets through whatever its readers raise
            raise BadSampleError(
                f"{self._split}/{index} of {self._folder} cannot be read ({_shortened(error)})"
            ) from error
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
        if not self._class_names:
            return _text(label)
        # -1 is what TFDS gives to examples without a label.
        if not -1 <= label < len(self._class_names):
            raise BadSampleError(
                f'"{self._label_key}" is {label}, of {len(self._class_names)} classes', "no_example"
            )
        return None if label < 0 else self._class_names[label]


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"The prepared data in {folder} is damaged ({_shortened(error)}); prepare the data set again."
    )


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 150)


def _check_split(splits: Mapping[str, Any], split: str | None, folder: Path) -> None:
    try:
        size = splits[split or ""].num_examples  # of "train[:10%]", too
    except (KeyError, ValueError) as error:
        raise not_found(folder, split, splits) from error
    if not size:
        raise UserError(f"The split {split!r} of {folder} is empty; choose another one.")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
