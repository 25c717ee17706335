"""The classes of an evaluation: their names, the sentences about each, and the files that list them.

A class file has our own format, CLIP_benchmark's or another common format.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.config_schema import nearest
from lit_jax.data.files import AddressError, File, check_text, locate, read_whole
from lit_jax.data.listing import expand
from lit_jax.display import without_details
from lit_jax.errors import UserError
from lit_jax.files import parse_json

# The place of the class name in a template; "{c}" is CLIP_benchmark's spelling.
PLACEHOLDER = re.compile(r"\{c?\}")

# The templates if neither file has any: photographs from near and far, and pictures that are not photographs.
DEFAULT_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "en": (
        "{}",
        "a photo of {}",
        "this picture shows {}",
        "{}, seen from close by",
        "{}, far away and small",
        "a dark and blurred photo of {}",
        "a drawing of {}",
        "one of many kinds of {}",
    ),
}
# The default templates in any other language.
BARE_NAME = ("{}",)
# Matches "7", "007", "-1", and "7.0" as pandas writes 7. Python refuses numbers of more than 4300 digits.
_INTEGER = re.compile(r"([+-]?[0-9]{1,4000})(\.0*)?")
# Numbers, ids and marks in front of a name: "0 cat", "1. cat", "2,cat", "n02123045 tabby", "- cat", '"cat",'.
_NUMBER = re.compile(r"([0-9]{1,9})(\s*[.:;,)=|-]\s*|\s+)\S")
_WORDNET_ID = re.compile(r"n[0-9]{8}[\s,:]+\S")
_MARK = re.compile(r"[-*]\s|([\"']).*\1,?$")
# transformers names a class so if the user gives it no name.
_PLACEHOLDER_NAME = re.compile(r"LABEL_[0-9]+")
# The files of CLIP_benchmark's WebDataset layout. They lie beside the tars, or beside the splits' folders.
CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
# The file contains "retrieval" or "multilabel"; without the file the task is classification.
TASK = "dataset_type.txt"
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The names of C classes, and T templates: sentences with '{}' or '{c}' in the place of the name.

    Attributes:
        prompts: for each class its own sentences, which replace the templates.
        labels: the data set's labels of the classes, in the same order. If empty, the data's labels are the
            names, or the positions of the names.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ()

    def texts(self) -> list[tuple[str, ...]]:
        """Return the sentences about each class."""
        return list(self.prompts) or [
            tuple(fill(template, name) for template in self.templates) for name in self.names
        ]


def fill(template: str, name: str) -> str:
    """Return the template with `name` in the place of each placeholder."""
    # The replacement is a function, because in a string `re` would interpret a backslash.
    return PLACEHOLDER.sub(lambda _: name, template)


def integer(label: str) -> int | None:
    """Return the whole number that a label spells, with or without blanks around it, or None."""
    match = _INTEGER.fullmatch(label.strip())
    return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClassFile:
    """The content of a class file."""

    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] | None = None


def load_classes(config: EvalConfig, name: str, language: str = "en") -> Classes:
    """Read the class file of an evaluation, and its template file if there is one.

    An evaluation without a class file uses the two files in its data set, if they exist.

    Args:
        name: the name of the evaluation, which selects the data set in files about several data sets, unless
            `config.dataset` is set.
        language: replaces "{language}" in the paths, and selects the default templates.

    Raises UserError if a file is missing or has no known format, if a template has no placeholder, if a class
    is empty, or if two classes are the same.
    """
    file = _file(config.classes, language)
    template_file = _file(config.templates, language)
    if file is None:
        file = classes_in(config.data, language)
        if file is None:
            raise UserError(
                f"config.evals.{name}.classes is missing, and its data has no {CLASS_NAMES}; set it to the "
                "path of a class file."
            )
        beside = file.parent / TEMPLATES
        template_file = template_file or (beside if beside.is_file() else None)
    dataset = config.dataset or name
    found = _class_file(_read(file), dataset, file)
    given: Any = found.templates or DEFAULT_TEMPLATES.get(language, BARE_NAME)
    if template_file:
        given = _template_file(_read(template_file), dataset, template_file)
    # Messages name the file that a user has to change.
    templates_from = template_file or file
    # CLIP_benchmark's templates may be a map from each class to sentences of its own (CuPL).
    if isinstance(given, Mapping):
        if missing := [name for name in found.names if name not in given]:
            raise UserError(
                f"{templates_from} has no sentences for the class {missing[0]!r} of {file}; add some."
            )
        prompts = tuple(_strings(given[name], name, templates_from) for name in found.names)
        return Classes(names=found.names, labels=found.labels, prompts=prompts)
    for template in given:
        if not PLACEHOLDER.search(template):
            raise UserError(
                f"The template {template!r} in {templates_from} needs '{{}}' or '{{c}}' where the name goes."
            )
    return Classes(names=found.names, templates=given, labels=found.labels)


def classes_in(config: SourceConfig, language: str = "en") -> File | None:
    """Return the file of class names in a data set for classification, or None without one.

    Raises UserError if the data set cannot be read, or if its images have several classes each.
    """
    paths = expand(config.path.replace("{language}", language)) if config.path else []
    if not paths:
        return None
    try:
        place = locate(paths[0])
        folder = place.parent if place.suffix.lower() == ".tar" else place
        # In CLIP_benchmark's layout the files lie beside the folders of the splits, one level above the data.
        is_split = folder.name in {*_SPLITS, config.split}
        for home in (folder, folder.parent) if is_split else (folder,):
            if (home / CLASS_NAMES).is_file():
                return home / CLASS_NAMES if _task(home) != "retrieval" else None
    # There is no permission, no network, or no credentials.
    except (AddressError, OSError) as error:
        raise UserError(
            f"The data of an evaluation cannot be read ({error}); check the path, the permissions and the "
            "network."
        ) from error
    return None


def _task(home: File) -> str:
    file = home / TASK
    task = " ".join(_lines(file)).lower() if file.is_file() else ""
    if task == "multilabel":
        raise UserError(
            f"{file} says that an image has several classes, but lit_jax evaluates only data with one class "
            "for each image; choose other data."
        )
    return task


def _file(path: str | None, language: str) -> File | None:
    return locate(path.replace("{language}", language)) if path else None


def _lines(file: File) -> list[str]:
    """Return the stripped lines of a text file that are not blank. Raise UserError if it cannot be read."""
    try:
        content = read_whole(file)
        check_text(file)
        text = content.decode("utf-8-sig")
    except (OSError, AddressError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"The class file {file} cannot be read ({without_details(reason)}); check its path."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"The class file {file} is not UTF-8 ({error}); save it as text in UTF-8."
        ) from error
    return [line for line in map(str.strip, re.split("[\r\n]", text)) if line]


def _read(file: File) -> Any:
    """Return the content of a class or template file: its lines, or the value of its JSON."""
    lines = _lines(file)
    # A text file may contain JSON under another suffix; if it does not parse, it is a list of names.
    is_json = file.suffix.lower() == ".json"
    if is_json or (lines and lines[0][0] in "{["):
        try:
            return parse_json("\n".join(lines))
        except ValueError as error:
            if is_json:
                raise UserError(
                    f"The class file {file} is not JSON ({error}); correct it, or rename it to *.txt if each "
                    "line is a name."
                ) from error
    _require_bare(lines, file)
    return lines


def _require_bare(lines: Sequence[str], file: File) -> None:
    """Raise UserError if the lines have numbers, columns or marks beside the names or templates."""
    numbers = [int(match[1]) for line in lines if (match := _NUMBER.match(line))]
    if file.suffix.lower() in (".csv", ".tsv") or any("\t" in line for line in lines):
        problem = "is a table"
    elif len(numbers) > 1 and numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)]):
        problem = "has a number in front of each line"
    elif lines and all(map(_WORDNET_ID.match, lines)):
        problem = "has an id of WordNet in front of each name"
    elif lines and (lines[0].startswith("# ") or all(map(_MARK.match, lines))):
        problem = "has marks, such as quotes, in its lines"
    else:
        return
    raise UserError(
        f"The class file {file} {problem} ({lines[0]!r}), which would become a part of the texts; write the "
        'bare names into a .txt file, one on each line, or JSON: a list, or {"0": "cat", "1": "dog", ...}.'
    )


def _class_file(content: Any, dataset: str, file: File) -> _ClassFile:
    """Return the content of a class file in any format, recognised by its keys and values."""
    if isinstance(content, list):
        return _ClassFile(names=_strings(content, "", file))
    if not isinstance(content, dict) or not content:
        raise UserError(_form(file))
    if "classnames" in content or "templates" in content:
        return _own_form(content, file)
    numbered = content.get("id2label", content)
    # The inverse map, {"cat": 0, "dog": 1}, as in `class_to_idx` of torchvision.
    # `type` excludes true and false, which isinstance would accept as integers.
    if all(type(value) is int for value in content.values()):
        numbered = {str(number): name for name, number in content.items()}
    if isinstance(numbered, dict) and all(isinstance(name, str) for name in numbered.values()):
        return _numbered(numbered, file)
    # The labels are the names of ImageNet's folders, by which the images are labelled.
    if _is_keras_index(content):
        found = _numbered({number: name for number, (_, name) in content.items()}, file)
        labels = {int(number): label for number, (label, _) in content.items()}
        return _ClassFile(names=found.names, labels=tuple(labels[n] for n in sorted(labels)))
    key = _dataset(content, dataset, file)
    return _ClassFile(names=_strings(content[key], key, file))


def _own_form(content: Mapping[str, Any], file: File) -> _ClassFile:
    names = _strings(content.get("classnames"), "classnames", file)
    templates, labels = None, ()
    if "templates" in content:
        templates = _strings(content["templates"], "templates", file)
    if "labels" in content:
        listed = content["labels"]
        # A label that is the number 1 equals the label "1" of the data. `type` excludes true and false.
        if isinstance(listed, list):
            listed = [str(label) if type(label) is int else label for label in listed]
        labels = _strings(listed, "labels", file)
    if labels and len(labels) != len(names):
        raise UserError(
            f"{file} has {len(names)} classnames but {len(labels)} labels; give one label for each name."
        )
    # Two classes may share a name if labels tell them apart, as "crane" does in ImageNet.
    key = "labels" if labels else "classnames"
    value, times = collections.Counter(labels or names).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{value!r} appears {times} times in the {key} of {file}; make them all different."
        )
    return _ClassFile(names=names, labels=labels, templates=templates)


def _numbered(names: Mapping[str, str], file: File) -> _ClassFile:
    """Return the classes of {"0": "cat", "1": "dog"}, as in the config.json of a transformers classifier.

    If the numbers do not count from 0, they are the labels of the classes.
    """
    numbers = {number: key for key in names if (number := integer(key)) is not None}
    if not names or len(numbers) != len(names):
        raise UserError(_form(file))
    if all(_PLACEHOLDER_NAME.fullmatch(name) for name in names.values()):
        raise UserError(
            f"The class file {file} has the names that transformers gives to classes without a name, such as "
            f"{min(names.values())}; write the real names."
        )
    keys = [numbers[number] for number in sorted(numbers)]
    # Numbers from 0 on are positions, which every data set without names of its own has as labels.
    from_zero = sorted(numbers) == list(range(len(numbers)))
    return _ClassFile(
        names=_strings([names[key] for key in keys], "id2label", file),
        labels=() if from_zero else tuple(keys),
    )


def _is_keras_index(content: Mapping[str, Any]) -> bool:
    """Return whether the content is Keras's {"0": ["n01440764", "tench"], ...}: number, label and name."""
    return len(content) > 1 and all(
        key.isdecimal() and isinstance(value, list) and [type(v) for v in value] == [str, str]
        for key, value in content.items()
    )


def _template_file(content: Any, dataset: str, file: File) -> tuple[str, ...] | Mapping[str, Any]:
    """Return the templates for all classes, or a map from each class to its own sentences."""
    if isinstance(content, list):
        return _strings(content, "", file)
    if not isinstance(content, dict) or not content:
        raise UserError(_form(file))
    if "templates" in content:
        return _strings(content["templates"], "templates", file)
    # Like CLIP_benchmark, ImageNet's templates serve the data sets without templates of their own.
    key = _dataset(content, dataset, file, default="imagenet1k")
    return content[key] if isinstance(content[key], dict) else _strings(content[key], key, file)


def _form(file: File, key: str = "") -> str:
    lacks = f", and {key!r} a list of at least one text" if key else ""
    return (
        f"The class file {file} must be a text file with one name on each line, or JSON: a list of names, "
        '{"classnames": [...], "templates": [...]}, a list for each data set, or {"id2label": {"0": '
        f"...}}}}{lacks}."
    )


def _strings(value: Any, key: str, file: File) -> tuple[str, ...]:
    """Return the texts under `key` of a class or template file. Raise UserError if one is not text."""
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(_form(file, key))
    if any(not text.strip() for text in value):
        where = f"{key!r} of {file}" if key else str(file)
        raise UserError(f"{where} has an empty text; remove it, or name the class.")
    return tuple(value)


def _dataset(content: Mapping[str, Any], name: str, file: File, default: str = "") -> str:
    """Return the key of a data set: its name, the part of the name behind the last '/', or the only key."""
    for key in (name, name.rpartition("/")[2], *([*content] if len(content) == 1 else []), default):
        if key in content:
            return key
    raise UserError(
        f"{file} has no data set {name!r}; set dataset of the evaluation to one that the file has "
        f"({nearest(name, content)})."
    )
