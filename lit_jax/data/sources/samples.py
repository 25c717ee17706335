"""Samples made of several files: the files of one folder whose names differ only in the ending.

WebDataset ends a sample's name at the first dot, so that `a.left.png` belongs to `a`. People also write names
such as `photo.v2.jpg`. `decide` chooses the dot, once for a whole data set.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadKind, Example
from lit_jax.data.files import MAX_FILE_BYTES, File
from lit_jax.data.image import IMAGE_SUFFIXES
from lit_jax.data.listing import MOST_KINDS, is_system
from lit_jax.data.sources.rows import example_of
from lit_jax.files import parse_json

# Field -> endings in order of preference; a sample's field is read from the first ending that exists. Some
# tools write captions as .caption or .text.
FIELDS = {
    "image": (IMAGE_SUFFIXES,),
    "text": ((".txt",), (".caption",), (".text",)),
    "json": ((".json",),),
    "cls": ((".cls",),),
}
_FIELD_OF = {suffix: field for field, ranks in FIELDS.items() for rank in ranks for suffix in rank}

# Reasons why a sample cannot be used, by the word that stands for the reason in an index.
FLAWS: Mapping[str, tuple[BadKind, str]] = {
    "outside": ("hostile_path", "is a link, or its name leads out of the folder"),
    "sparse": ("damaged", "is stored with holes (GNU sparse); pack the tar again without --sparse"),
    "cut": ("damaged", "goes beyond the end of its file; download the file again"),
    "large": ("too_large", f"has a file of more than {MAX_FILE_BYTES:,} bytes"),
    "images": ("no_example", "has several images, so it is unclear which one is meant"),
}
# The wording of the warnings about samples with a problem.
_PROBLEMS = {
    "no image": "have no image",
    "images": "have several images, and are bad samples",
    "texts": "have several caption files, which are all read",
}
# The most examples of each kind in a message.
_EXAMPLES = 3


class Member(NamedTuple):
    """A file in a folder or in a tar.

    Attributes:
        folder: the path with a slash at its end, or "".
        start, stop: the range of the file's bytes in the tar.
        flaw: a key of `FLAWS`, or "".
    """

    folder: str
    name: str
    start: int = 0
    stop: int = 0
    flaw: str = ""


class Sample(NamedTuple):
    """The members that are read for one sample.

    Attributes:
        members: the members by their field of `FIELDS`.
        flaw: a key of `FLAWS`, or "".
    """

    key: str
    members: Mapping[str, Sequence[Member]]
    flaw: str


# The members of a sample by field and ending, and the same with the sample's key.
_ByField = Mapping[str, Mapping[str, Member]]
_Group = tuple[str, _ByField]
# Kind -> (number, a few examples).
Counts = dict[str, tuple[int, list[str]]]


class Reading(NamedTuple):
    """The samples of a folder or a tar, if keys end at one of the two dots.

    Attributes:
        problems: pairs of (key of a sample, key of `_PROBLEMS`).
        unread: members that are not read, by their ending, because they belong to no sample or their sample
            has a preferred member.
        images: the number of samples with an image.
        described: the number of these with a text, json or cls.
        surplus: the number of images beside the one that is read.
    """

    samples: pa.RecordBatch
    problems: frozenset[tuple[str, str]]
    unread: Counts
    images: int
    described: int
    surplus: int


# The reading by the first dot and the reading by the last dot; the same object if no name has two dots.
Readings = tuple[Reading, Reading]


def read_members(
    members: Sequence[Member],
    pack: Callable[[Sequence[Sample]], pa.RecordBatch],
    place: str = "",
    at_least: Collection[str] = tuple(FIELDS),
) -> Readings:
    """Return the samples of a sequence of members, as read by the first dot of the names and by the last.

    Members of one sample need not be neighbours; a second member with the same ending begins a new sample, as
    in WebDataset.

    Args:
        pack: the function that turns samples into a table.
        place: a prefix of names in messages.
        at_least: the fields of which a sample needs at least one; files without such a field are not read.
    """
    first = _read(members, pack, place, at_least, last_dot=False)
    if all(member.name.count(".") < 2 for member in members):
        return first, first
    return first, _read(members, pack, place, at_least, last_dot=True)


def decide(readings: Sequence[Readings]) -> list[Reading]:
    """Return the reading of each folder or tar, by the same dot for all of them.

    The last dot is chosen if the first dot leaves samples without an image, or with ambiguous images or
    captions, and the last dot causes no new such problem. A second image beside a plain one (a.mask.png
    beside a.jpg) is not a problem, unless the last dot gives the second image a description of its own.
    """
    by_first, by_last = zip(*readings, strict=True)
    pairs = [(first.problems, last.problems) for first, last in readings]
    # Images that the first dot drops are lost only if the last dot pairs them with captions, or if the data
    # set has no captions at all.
    described = sum(reading.described for reading in by_last)
    is_poorer = described == 0 or described > sum(reading.described for reading in by_first)
    lost = is_poorer and any(first.surplus > last.surplus for first, last in readings)
    if (lost or any(first - last for first, last in pairs)) and not any(
        last - first for first, last in pairs
    ):
        return [*by_last]
    return [*by_first]


def remarks(readings: Iterable[Reading]) -> dict[str, str]:
    """Return sentences about incomplete or ambiguous samples, and about files that are not read.

    The keys are those of `_PROBLEMS`, and "unread".
    """
    problems, unread = {}, {}
    for reading in readings:
        for suffix, (number, names) in reading.unread.items():
            _count(unread, suffix, names, number)
        for key, problem in sorted(reading.problems):
            _count(problems, problem, [key])
    said = {
        problem: f"samples that {_PROBLEMS[problem]}: {_listed({'': found})}"
        for problem, found in problems.items()
    }
    if unread:
        said["unread"] = (
            "files that are not read, because their kind is unknown or their sample already has a file of "
            f"that kind: {_listed(unread)}"
        )
    return said


def _listed(counts: Counts) -> str:
    return "; ".join(
        f"{number} {what}".strip() + f" (for example {', '.join(names)})"
        for what, (number, names) in counts.items()
    )


def _count(counts: Counts, what: str, names: Sequence[str], number: int = 1) -> None:
    # Data with a different ending for each file would otherwise make an endless message.
    if what not in counts and len(counts) >= MOST_KINDS:
        what = "other"
    known, examples = counts.get(what, (0, []))
    counts[what] = known + number, [*examples, *names][:_EXAMPLES]


def _read(
    members: Iterable[Member],
    pack: Callable[[Sequence[Sample]], pa.RecordBatch],
    place: str,
    at_least: Collection[str],
    *,
    last_dot: bool,
) -> Reading:
    samples, problems, unread = [], set(), {}
    images = described = surplus = 0
    for key, group in _joined(_groups(members, last_dot, place, unread)):
        chosen = {field: _choose(field, found) for field, found in group.items()}
        # Files without a required field are not a sample; they are counted as unread.
        if not any(field in group for field in at_least):
            for member in [m for found in group.values() for m in found.values()]:
                _count(unread, f".{_suffix(member)}", [place + member.folder + member.name])
            continue
        # One unusable member makes the whole sample unusable.
        flaw = next((m.flaw for found in chosen.values() for m in found if m.flaw), "")
        if "image" not in chosen:
            problems.add((place + key, "no image"))
        elif len(chosen["image"]) > 1:
            problems.add((place + key, "images"))
            flaw = flaw or "images"
        if len(chosen.get("text", ())) > 1:
            problems.add((place + key, "texts"))
        left = [
            m
            for field, found in group.items()
            if len(found) > 1
            for m in found.values()
            if m not in chosen[field]
        ]
        for member in left:
            _count(unread, f".{_suffix(member)}", [place + member.folder + member.name])
        # `decide` compares these counts for the two dots, and `pairs` tells samples from folders of classes.
        images += "image" in chosen
        described += "image" in chosen and len(chosen) > 1
        surplus += len(group.get("image", ())) - len(chosen.get("image", ()))
        samples.append(Sample(key, chosen, flaw))
    return Reading(pack(samples), frozenset(problems), unread, images, described, surplus)


def _groups(
    members: Iterable[Member], last_dot: bool, place: str, unread: Counts
) -> Iterator[_Group]:
    """Yield the key of neighbouring members with these members; add the other members to `unread`."""
    current: str | None = None
    group: dict[str, dict[str, Member]] = {}
    for member in members:
        field = _FIELD_OF.get(f".{_suffix(member)}")
        stem, dot, ending = (member.name.rpartition if last_dot else member.name.partition)(".")
        # A tar made on a Mac has ._a.jpg beside a.jpg, for example.
        hidden = is_system(member.folder + member.name)
        if field is None or hidden:
            what = "hidden" if hidden else f".{_suffix(member)}" if dot else "without an ending"
            _count(unread, what, [place + member.folder + member.name])
            continue
        key, ending = member.folder + stem, ending.lower()
        # As in WebDataset, a repeated ending starts a new sample, even under the same key.
        if key != current or ending in group.get(field, ()):
            if current is not None:
                yield current, group
            current, group = key, {}
        group.setdefault(field, {})[ending] = member
    if current is not None:
        yield current, group


def _joined(groups: Iterable[_Group]) -> Iterator[_Group]:
    """Yield the groups; those of one key whose endings all differ are one group, at the place of the first.

    A plain `tar` packs the files of a folder in no order, so that a text may stand far from its image.
    """
    found, parts = [*groups], {}
    for key, group in found:
        parts.setdefault(key, []).append(group)
    whole = {key: _union(of_key) for key, of_key in parts.items() if len(of_key) > 1}
    for key, group in found:
        if not (joined := whole.get(key)):
            yield key, group
        elif group is parts[key][0]:
            yield key, joined


def _union(parts: Sequence[_ByField]) -> _ByField | None:
    """Return the members of all parts, or None if an ending repeats: then the parts are several samples."""
    union: dict[str, dict[str, Member]] = {}
    for part in parts:
        for field, of_field in part.items():
            known = union.setdefault(field, {})
            if known.keys() & of_field.keys():
                return None
            known.update(of_field)
    return union


def _suffix(member: Member) -> str:
    return member.name.rpartition(".")[2].lower()


def _choose(field: str, found: Mapping[str, Member]) -> list[Member]:
    """Return the member that a field is read from, or all images or texts if none of them is plain.

    A member is plain if its ending has no further dot: WebDataset, too, finds the image of a.jpg and
    a.mask.jpg under `jpg`.
    """
    if len(found) == 1:
        return [*found.values()]
    for rank in FIELDS[field]:
        of_rank = {e: m for e, m in found.items() if f".{_suffix(m)}" in rank}
        chosen = [m for e, m in of_rank.items() if "." not in e] or [*of_rank.values()]
        if chosen:
            return chosen if len(chosen) == 1 or field in ("image", "text") else []
    raise AssertionError(f"{field} has no member")


class Parts(NamedTuple):
    """The contents of the files of a sample."""

    # The content of the image, or its path.
    image: bytes | str | None
    texts: Sequence[bytes]
    json: bytes | None
    cls: bytes | None


def json_fields(parts: Parts) -> Collection[str]:
    """Return the names of the fields in a sample's json. Raise ValueError or TypeError if it is broken."""
    return () if parts.json is None else _object(parts.json).keys()


def example_of_parts(
    parts: Parts, config: SourceConfig, folder: File, *, key: str, text_only: bool
) -> Example:
    """Return the example that the files of a sample describe.

    The captions come from the text files and the label from the cls file. Captions come from the json if
    there are no text files, or if `caption_key` is set to a field of the json; the same is true of the label,
    the cls file and `label_key`.

    Raises the errors of `example_of`.
    """
    takes_texts = bool(parts.texts) and config.caption_key == SourceConfig.caption_key
    cls = parts.cls if config.label_key == SourceConfig.label_key else None
    about = None
    if parts.json is not None:
        try:
            about = _object(parts.json)
        except (ValueError, TypeError):
            # Broken json is an error only if the captions or the label have to come from it.
            if not takes_texts and cls is None:
                raise
    # The "key" in img2dataset's json is replaced, because it names neither shard nor folder.
    row = {**(about or {}), "key": key, config.image_key: parts.image}
    if takes_texts:
        texts = [text.decode("utf-8-sig") for text in parts.texts]
        # Each line is a caption (CLIP_benchmark), unless the json contains the caption, too, as in the output
        # of img2dataset, which writes a caption with line breaks as it is.
        if parts.json is None or (about is not None and about.get("caption") is None):
            texts = [line for text in texts for line in text.splitlines() if line.strip()]
        row |= {config.caption_key: texts}
    if cls is not None:
        row |= {config.label_key: cls.decode("utf-8-sig", "replace").strip()}
    return example_of(row, config, folder, text_only=text_only)


def _object(content: bytes) -> dict[str, Any]:
    value = parse_json(content.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise TypeError("its JSON is not an object")
    return value
