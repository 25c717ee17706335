"""Images in files whose captions or classes stand together: folders by class, COCO, Flickr30k."""

import collections
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set

import pyarrow as pa

from lit_jax.data.example import Example
from lit_jax.data.files import File, read_text, readable
from lit_jax.data.listing import is_system, shown, system_part
from lit_jax.data.sources import splits
from lit_jax.errors import UserError
from lit_jax.files import parse_json

log = logging.getLogger(__name__)

# Endings of image files in every kind of source. The tuple stays the same whatever Pillow is installed, since
# it decides which samples a source has; an index of tar files is made again when it changes (VERSION there).
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
# Where images lie beside a caption file, if not in its own folder.
IMAGE_FOLDERS = ("images", "flickr30k-images", "flickr30k_images")


class ListedSource:
    """Images of a folder, each with captions or the name of its class. Kept as Arrow arrays.

    Args:
        names: paths relative to `folder`.
        captions: of each image; None: there are none.
        labels: of each image, the name of its folder; None: there are none.
    """

    def __init__(
        self,
        folder: File,
        names: Sequence[str],
        captions: Sequence[Sequence[str]] | None = None,
        labels: Sequence[str] | None = None,
    ):
        self._folder = folder
        # Any bytes: what a file is called need not be UTF-8.
        self._names = pa.array(map(os.fsencode, names), pa.large_binary())
        self._captions = (
            None if captions is None else pa.array(captions, pa.large_list(pa.large_string()))
        )
        # Few names, many images: a dictionary keeps each name once.
        self._labels = None if labels is None else pa.array(labels, pa.string()).dictionary_encode()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = os.fsdecode(self._names[index].as_py())
        return Example(
            key=readable(name),
            image=self._folder / name,
            captions=tuple(self._captions[index].as_py()) if self._captions is not None else (),
            label=self._labels[index].as_py() if self._labels is not None else None,
            label_is_folder=self._labels is not None,
        )


def image_folder(folder: File, found: Sequence[str]) -> ListedSource | None:
    """Return the images in a folder for each class, at any depth; None if there is no image in a folder.

    Args:
        found: the paths of all files and folders in it, as `walk` gives them.

    Raises UserError if the folders are splits.
    """
    kept = [name for name in found if not is_system(name)]
    images = sorted(name for name in kept if name.lower().endswith(IMAGE_SUFFIXES))
    names = [name for name in images if "/" in name]
    classes = {name.split("/", 1)[0] for name in names}
    splits.require_named(folder, names)
    if not names:
        return None
    _tell_left_out(folder, found, images, classes)
    labels = [readable(name.split("/", 1)[0]) for name in names]
    return ListedSource(folder, names, labels=labels)


def _tell_left_out(
    folder: File, found: Sequence[str], images: Sequence[str], classes: Set[str]
) -> None:
    """Say what of the paths `found` gives no example: hidden ones, folders and images without a class."""
    hidden = {system_part(name) for name in found if is_system(name)}
    folders = {name.split("/", 1)[0] for name in found if "/" in name and not is_system(name)}
    outside = [name for name in images if "/" not in name]
    if hidden:
        log.info(
            "%d hidden or system files and folders in %s are left out: %s.",
            len(hidden), folder, shown(hidden),
        )  # fmt: skip
    if empty := folders - classes:
        log.warning(
            "%d of the %d folders in %s have no image and are no classes: %s.",
            len(empty), len(folders), folder, shown(empty),
        )  # fmt: skip
    if outside:
        log.warning(
            "%d images in %s lie in no folder of a class and are left out: %s.",
            len(outside), folder, shown(outside),
        )  # fmt: skip


def open_coco(file: File, split: str | None) -> ListedSource:
    """A caption file of COCO: "images" with id and file_name, "annotations" with image_id and caption."""
    with _parsing(file):
        content = parse_json(read_text(file))
        captions = collections.defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        images = {image["file_name"]: captions[image["id"]] for image in content["images"]}
    return _captioned(file, images, split or file.stem.removeprefix("captions_"))


def open_karpathy(file: File, split: str | None) -> ListedSource:
    """dataset_flickr30k.json or dataset_coco.json of Karpathy; "train+restval" is two splits in one."""
    with _parsing(file):
        rows = parse_json(read_text(file))["images"]
        known = {row["split"] for row in rows}
        wanted = set(split.split("+")) if split else known
        images = {
            f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"]: [
                sentence["raw"] for sentence in row["sentences"]
            ]
            for row in rows
            if row["split"] in wanted
        }
    if not wanted <= known:
        raise splits.not_found(file, split, known)
    return _captioned(file, images)


def open_flickr(file: File) -> ListedSource:
    """results_20130124.token of Flickr30k: lines of name#number, tab, caption."""
    images = collections.defaultdict(list)
    with _parsing(file):
        for line in filter(str.strip, read_text(file).split("\n")):
            place, caption = line.rstrip("\r").split("\t", 1)
            name, _ = place.rsplit("#", 1)
            images[name].append(caption)
    return _captioned(file, images)


@contextlib.contextmanager
def _parsing(file: File) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(
            f"{file} is no caption file of its kind ({error!r}); get it again."
        ) from error


def _captioned(file: File, images: Mapping[str, Sequence[str]], split: str = "") -> ListedSource:
    if not images:
        raise UserError(f"{file} lists no images; use another file or split.")
    folders = [file.parent / name for name in (".", *IMAGE_FOLDERS)]
    if split:
        folders += [file.parent / split, file.parent.parent / split]
    first = next(iter(images))
    for folder in folders:
        if (folder / first).is_file():
            return ListedSource(folder, list(images), captions=list(images.values()))
    raise UserError(
        f"The image {first!r} that {file} lists is in none of the folders "
        f"{', '.join(map(str, folders))}; put the images into one of them."
    )
