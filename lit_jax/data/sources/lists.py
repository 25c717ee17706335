"""Images whose captions are in a single file (COCO, Flickr30k), or whose folders are their classes."""

import collections
import contextlib
import itertools
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from lit_jax.data.example import BadSampleError, Example
from lit_jax.data.files import (
    File,
    check_text,
    encoding_problem,
    find,
    read,
    read_text,
    readable,
    require_regular,
    signature,
)
from lit_jax.data.image import IMAGE_SUFFIXES
from lit_jax.data.listing import MOST_KINDS, is_system, shown, system_part
from lit_jax.data.sources import splits
from lit_jax.data.sources.rows import resolve
from lit_jax.errors import UserError
from lit_jax.files import parse_json

log = logging.getLogger(__name__)

# The usual folders of images, beside a caption file or one level above.
IMAGE_FOLDERS = (
    *("images", "Images", "image", "imgs", "flickr30k-images", "flickr30k_images"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset"),
)
# The number of listed images that are tried to find their folder.
_TRIED = 5
# The bytes at the start and the end of a JSON file by which COCO's format is recognised.
_EDGE_BYTES = 1 << 16
_COCO = re.compile(rb'(\xef\xbb\xbf)?\s*\{.*"(images|annotations)"\s*:\s*\[', re.DOTALL)


class ListedSource:
    """The images of a folder, each with captions or with a class name.

    The values are Arrow arrays, since millions of Python objects would fill the memory and be copied to
    worker processes.

    Args:
        names: paths relative to `folder`.
        captions: the captions of each image, or None without captions. A null is skipped; an image with any
            other caption that is not text is a bad sample.
        labels: the class name of each image, which is the name of its folder, or None without labels.
    """

    def __init__(
        self,
        folder: File,
        names: Sequence[str],
        captions: Sequence[Sequence[Any]] | None = None,
        labels: Sequence[str] | None = None,
    ):
        self._folder = folder
        # Bytes instead of strings: a file name need not be UTF-8, and JSON may contain half a surrogate pair.
        self._names = pa.array(map(_encoded, names), pa.large_binary())
        self._captions, self._problems = None, {}
        if captions is not None:
            texts = [[text for text in of_one if text is not None] for of_one in captions]
            # Raised on access, so that one bad caption does not prevent the data set from being opened.
            self._problems = {
                i: text for i, of_one in enumerate(texts) for text in map(_problem, of_one) if text
            }
            usable = [
                [] if i in self._problems else [*map(_encoded, t)] for i, t in enumerate(texts)
            ]
            self._captions = pa.array(usable, pa.large_list(pa.large_binary()))
        # Dictionary encoding stores each of the few class names once.
        self._labels = None if labels is None else pa.array(labels, pa.string()).dictionary_encode()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = _decoded(self._names[index].as_py())
        if problem := self._problems.get(range(len(self))[index]):
            raise BadSampleError(
                f"{readable(name)} has a caption that is not text: {problem}", "no_example"
            )
        captions = () if self._captions is None else self._captions[index].as_py()
        return Example(
            key=readable(name),
            image=self._folder / name,
            captions=tuple(map(_decoded, captions)),
            label=self._labels[index].as_py() if self._labels is not None else None,
            label_is_folder=self._labels is not None,
        )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _problem(caption: object) -> str | None:
    return None if isinstance(caption, str) else textwrap.shorten(repr(caption), 80)


def image_folder(folder: File, found: Sequence[str]) -> ListedSource | None:
    """Return the images below the folders of classes, at any depth, or None if no folder has images.

    Args:
        found: the paths of all files and folders in `folder`, as `walk` yields them.

    Raises UserError if the folders are splits.
    """
    kept = [name for name in found if not is_system(name)]
    images = sorted(name for name in kept if name.lower().endswith(IMAGE_SUFFIXES))
    names = [name for name in images if "/" in name]
    classes = {name.split("/", 1)[0] for name in names}
    # Folders called train and test would otherwise become two classes.
    splits.require_named(folder, names)
    if not names:
        return None
    _tell_left_out(folder, found, images, classes)
    labels = [readable(name.split("/", 1)[0]) for name in names]
    return ListedSource(folder, names, labels=labels)


def _tell_left_out(
    folder: File, found: Sequence[str], images: Sequence[str], classes: Set[str]
) -> None:
    """Log the paths that give no example: hidden ones, folders without images, images without a class."""
    hidden = {system_part(name) for name in found if is_system(name)}
    folders = {name.split("/", 1)[0] for name in found if "/" in name and not is_system(name)}
    outside = [name for name in images if "/" not in name]
    if hidden:
        log.info(
            "%d hidden or system files and folders in %s are left out: %s.",
            len(hidden),
            folder,
            shown(hidden),
        )
    # The endings first, because nearly all of what may be millions of files are images.
    others = [name for name in found if not name.lower().endswith((*IMAGE_SUFFIXES, "/"))]
    if others := [name for name in others if not is_system(name)]:
        endings = collections.Counter(PurePosixPath(name).suffix.lower() for name in others)
        # A list or a readme above the folders is not a lost picture.
        log.log(
            logging.WARNING if any("/" in name for name in others) else logging.INFO,
            "%d files in %s are not read, because their endings are those of no image format that is read: "
            "%s (for example %s).",
            len(others),
            folder,
            ", ".join(
                f"{n} {ending or 'without one'}" for ending, n in endings.most_common(MOST_KINDS)
            ),
            shown(others, 3),
        )
    if empty := folders - classes:
        log.warning(
            "%d of the %d folders in %s have no image and do not count as classes: %s.",
            len(empty),
            len(folders),
            folder,
            shown(empty),
        )
    if outside:
        log.warning(
            "%d images in %s are outside the folders of the classes and are left out: %s.",
            len(outside),
            folder,
            shown(outside),
        )


def is_coco(file: File, image_key: str) -> bool:
    """Return whether a JSON file lists images and, apart from them, captions, whatever the file's name is."""
    require_regular([file])
    size, _ = signature(file)
    head = read(file, 0, _EDGE_BYTES)
    # COCO's files of boxes have the same lists, without captions. Captions are in the first or the last list.
    tail = read(file, max(0, size - _EDGE_BYTES), size)
    return _COCO.match(head) is not None and b'"caption"' in head + tail


def open_coco(file: File, split: str | None) -> ListedSource:
    """Open COCO captions: "images" with id and file_name, "annotations" with image_id and caption."""
    with parsing(file):
        content = parse_json(read_text(file))
        captions = collections.defaultdict(list)
        # COCO lists captions apart from the images, and joins them by the image's id. Some tools write the id
        # as a number in one of the lists and as text in the other.
        for annotation in content["annotations"]:
            captions[str(annotation["image_id"])].append(annotation["caption"])
        # An image that is listed twice with one id has its captions once.
        pairs = [
            *dict.fromkeys((image["file_name"], str(image["id"])) for image in content["images"])
        ]
        listed = _by_name((name, captions[number]) for name, number in pairs)
        unknown = captions.keys() - {number for _, number in pairs}
    if unknown:
        log.warning(
            "%d image_ids of the annotations in %s match no image of that file; their captions are left "
            "out.",
            len(unknown),
            file,
        )
    return captioned(file, listed, split or file.stem.removeprefix("captions_"))


def open_karpathy(file: File, split: str | None) -> ListedSource:
    """Open Karpathy's dataset_flickr30k.json or dataset_coco.json; "train+restval" joins two splits."""
    with parsing(file):
        rows = parse_json(read_text(file))["images"]
        known = {row["split"] for row in rows}
        wanted = set(split.split("+")) if split else known
        listed = _by_name(
            (
                # The COCO version names the folder of each image (val2014), the Flickr version does not.
                f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"],
                [sentence["raw"] for sentence in row["sentences"]],
            )
            for row in rows
            if row["split"] in wanted
        )
    if not wanted <= known:
        raise splits.not_found(file, split, known)
    return captioned(file, listed)


def _by_name(pairs: Iterable[tuple[Any, Iterable[Any]]]) -> dict[str, list[Any]]:
    """Return the captions of each file; a file that is listed twice gets the captions of both entries.

    Raises TypeError if the name of a file is not text.
    """
    listed = collections.defaultdict(list)
    for name, captions in pairs:
        if not isinstance(name, str):
            raise TypeError(f"the name of an image is {name!r}")
        listed[name] += captions
    return listed


@contextlib.contextmanager
def parsing(file: File) -> Iterator[None]:
    """Raise UserError if a caption file is damaged, or has another format than its name suggests."""
    check_text(file)
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 ({encoding_problem(error)}); save it as text in UTF-8."
        ) from error
    # UnicodeDecodeError, handled above, is a ValueError, too.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{file} cannot be read as a caption file ({textwrap.shorten(reason, 200)}); correct it, or "
            "download it again."
        ) from error


def captioned(
    file: File, listed: Mapping[str, Sequence[Any]], split: str | None = None
) -> ListedSource:
    """Return the images that a file lists, each with its captions under all spellings of its path.

    Raises UserError if there are none.
    """
    if not listed:
        raise UserError(f"{file} lists no images; use another file or split.")
    folder = folder_of_images(file, [*itertools.islice(listed, _TRIED)], split)
    names, captions = {}, collections.defaultdict(list)
    for name, texts in listed.items():
        path = name if "://" in name else resolve(name, folder) or name
        names.setdefault(path, name)
        captions[path] += texts
    return ListedSource(folder, [*names.values()], captions=[captions[path] for path in names])


def folder_of_images(file: File, names: Sequence[str], split: str | None = None) -> File:
    """Return the base folder of a caption file's image paths: the file's own folder, or one beside it.

    Args:
        names: some of the image paths. The folder has to contain at least one of them.
        split: also tried as the name of a folder.

    Raises UserError if no folder contains an image.
    """
    # Annotations often have a folder of their own beside the images, so the folder above is tried, too.
    bases = [
        base / name for base in (file.parent, file.parent.parent) for name in (".", *IMAGE_FOLDERS)
    ]
    folders = [*bases, *(base / split for base in bases if split)]
    for folder in folders:
        if any(find(folder / name).is_file() for name in names):
            return folder
    raise UserError(
        f"The image {names[0]!r} that {file} lists is in none of the folders "
        f"{shown(map(str, folders), 100)}; put the images into one of them."
    )
