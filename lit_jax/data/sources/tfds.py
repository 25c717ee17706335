"""Prepared data of TensorFlow Datasets (TFDS)."""

import functools
import logging
import operator
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_jax.config import SourceConfig
from lit_jax.data.copies import cached_copies
from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import File
from lit_jax.data.listing import shown, walk
from lit_jax.data.sources.rows import read_label
from lit_jax.data.sources.splits import not_found
from lit_jax.errors import UserError

log = logging.getLogger(__name__)

# The end of a shard's name, such as "-00000-of-00005".
_NUMBERED = re.compile(r"-of-\d{5,}$")


class TfdsSource:
    """A split of prepared TensorFlow Datasets data in ArrayRecord files; TensorFlow is not needed.

    The split's files in an object store are copied to this machine.

    Labels of a ClassLabel feature become class names. The captions may be a text or a sequence of texts, also
    inside a sequence of groups ("captions/text" of coco_captions).

    Raises UserError if the data are damaged, have no such split or features, or no ArrayRecord files.
    """

    def __init__(self, folder: File, config: SourceConfig):
        # Imported here, because the import is slow and only this format needs it.
        import tensorflow_datasets as tfds

        # Without the shards, which have their number in their names.
        about = [path for path in walk(folder) if not _NUMBERED.search(path) and path[-1] != "/"]
        local = cached_copies(folder, about)
        builder = _builder(folder, local)
        _check_split(builder.info.splits, config.split, folder)
        features = builder.info.features
        leaves = dict(_leaves(features))
        has_image = isinstance(dict(features.items()).get(config.image_key), tfds.features.Image)
        # A key may name a feature inside a group, such as "captions/text".
        named = {config.caption_key.partition("/")[0], config.label_key.partition("/")[0]}
        if not has_image or not named & {*features}:
            raise UserError(
                f"{folder} needs an image feature {config.image_key!r}, and {config.caption_key!r} or "
                f"{config.label_key!r}, but has {', '.join(sorted(leaves))}; set image_key, caption_key and "
                "label_key of this source to the names of its features."
            )
        captions = _chosen(leaves, config.caption_key, "caption_key", folder)
        label = _chosen(leaves, config.label_key, "label_key", folder)
        kind = label.feature if label else None
        self._class_names = kind.names if isinstance(kind, tfds.features.ClassLabel) else None
        self._folder = folder
        self._image_key = config.image_key
        self._label_path = config.label_key.split("/") if label else None
        self._caption_path = config.caption_key.split("/") if captions else None
        self._split = config.split
        # Images stay encoded: `image.decode` treats all sources alike, and shrinks JPEGs while decoding.
        decoders = {config.image_key: tfds.decode.SkipDecoding()}
        # A split without ArrayRecord files must not be copied before the error.
        self._rows = _rows(folder, builder, config.split, decoders)
        whole = cached_copies(folder, [*about, *builder.info.splits[config.split].filenames])
        if whole != local:
            self._rows = _rows(folder, _builder(folder, whole), config.split, decoders)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            row = self._rows[index]
        # A broken shard can raise any exception inside TFDS.
        except Exception as error:
            raise BadSampleError(
                f"{self._split}/{index} of {self._folder} cannot be read ({_shortened(error)})"
            ) from error
        label, problem = self._label(row)
        example = Example(
            key=f"{self._split}/{index}",
            image=row[self._image_key],
            captions=self._captions(row),
            label=label,
        )
        return {**example, "label_problem": problem} if problem else example

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self._caption_path is None:
            return ()
        texts = _inside(row, self._caption_path)
        try:
            return tuple(text.decode() for text in ([texts] if isinstance(texts, bytes) else texts))
        except UnicodeDecodeError as error:
            raise BadSampleError(f"a caption is not UTF-8 ({error})", "not_utf8") from error

    def _label(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Return (label, None), or (None, reason) if the value cannot be a label, or (None, None)."""
        if self._label_path is None:
            return None, None
        label, name = _inside(row, self._label_path), "/".join(self._label_path)
        # A label that is not a ClassLabel is a text, or a number without a name.
        if not self._class_names:
            if isinstance(label, bytes):
                return label.decode("utf-8", "replace"), None
            return read_label(
                {name: label.item() if isinstance(label, np.generic) else label}, name
            )
        # TFDS gives the label -1 to examples without a label.
        if not -1 <= label < len(self._class_names):
            return None, f'"{name}" is {label}, of {len(self._class_names)} classes'
        return None if label < 0 else self._class_names[label], None


def _damaged(folder: File, error: Exception) -> UserError:
    return UserError(
        f"The prepared data in {folder} is damaged ({_shortened(error)}); prepare the data set again."
    )


def _shortened(error: Exception | str) -> str:
    return textwrap.shorten(str(error), 150)


def _inside(row: Any, path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, row)


class _Leaf(NamedTuple):
    """A feature that is not a group of features."""

    feature: Any
    # 0 for one value in each example, 1 for a list of values.
    rank: int

    @property
    def holds(self) -> str:
        name = type(self.feature).__name__
        named = f"{self.feature.np_dtype}" if name in ("Tensor", "Scalar") else name
        return named if self.rank == 0 else f"lists of {named}"

    @property
    def is_text(self) -> bool:
        return np.dtype(self.feature.np_dtype) == object


# Config key -> (the highest rank of its feature, whether the feature has to be text).
_WANTED = {"caption_key": (1, True), "label_key": (0, False)}
_DEFAULTS = {"caption_key": SourceConfig.caption_key, "label_key": SourceConfig.label_key}


def _leaves(feature: Any, path: str = "", rank: int = 0) -> Iterator[tuple[str, _Leaf]]:
    """Yield all features that are not groups, with their path ("captions/text")."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        # A sequence adds a dimension to each feature inside.
        yield from _leaves(feature.feature, path, rank + 1)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for name, part in feature.items():
            yield from _leaves(part, f"{path}/{name}" if path else name, rank)
    else:
        yield path, _Leaf(feature, rank + len(feature.shape or ()))


def _chosen(leaves: Mapping[str, _Leaf], name: str, key: str, folder: File) -> _Leaf | None:
    """Return the feature called `name`, or None if the default of `key` does not exist.

    Raises UserError if the feature's type cannot be that of captions, or of a label.
    """
    most, has_to_be_text = _WANTED[key]

    def fits(leaf: _Leaf) -> bool:
        return leaf.rank <= most and (leaf.is_text or not has_to_be_text)

    leaf = leaves.get(name)
    if leaf and fits(leaf):
        return leaf
    if leaf and key == "label_key" and name == SourceConfig.label_key:
        # The user has not asked for the label, and captions do not need one.
        log.warning("%r in %s holds %s, so it is not read as a label.", name, folder, leaf.holds)
        return None
    inside = [path for path in leaves if path.startswith(f"{name}/")]
    if leaf is None and not inside and name in ("", _DEFAULTS[key]):
        return None
    problem = (
        f"holds {leaf.holds}"
        if leaf
        else f"is a group of {', '.join(sorted(inside))}"
        if inside
        else "is not among its features"
    )
    usable = [path for path, other in leaves.items() if fits(other)]
    raise UserError(
        f"{folder}: {key} is {name!r}, which {problem}; set {key} of this source to a suitable feature "
        f"({shown(usable)}), or to '' for none."
    )


def _builder(folder: File, local: Path) -> Any:
    """Return TFDS's builder of a local folder. Raise UserError, which names `folder`, if it is damaged."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(local)
    # A broken file can raise any exception inside TFDS.
    except Exception as error:
        raise _damaged(folder, error) from error


def _rows(folder: File, builder: Any, split: str | None, decoders: Mapping[str, Any]) -> Any:
    """Return the rows of a split, whose files are opened at the first row."""
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{folder} has no ArrayRecord files; prepare the data set again with "
            "`tfds build --file_format=array_record`."
        ) from error


def _check_split(splits: Mapping[str, Any], split: str | None, folder: File) -> None:
    try:
        # TFDS resolves slices such as "train[:10%]", too.
        size = splits[split or ""].num_examples
    except (KeyError, ValueError) as error:
        name, bracket, _ = (split or "").partition("[")
        if not bracket or name not in splits:
            raise not_found(folder, split, splits) from error
        # The first line of TFDS's message is the reason; the others list its grammar.
        reason = str(error.__cause__ or error).split("\n")[0]
        raise UserError(
            f"The split {split!r} of {folder} selects no part of {name!r} ({_shortened(reason)}); write it "
            f"as {name}[:10%] or {name}[100:200]."
        ) from error
    if size <= 0:
        raise UserError(f"The split {split!r} of {folder} is empty; choose another one.")
