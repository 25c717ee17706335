"""The names of classes, and the sentences about each class."""

import dataclasses
import re
from collections.abc import Mapping

# The place of the class name in a template; "{c}" is CLIP_benchmark's spelling.
PLACEHOLDER = re.compile(r"\{c?\}")

# The templates if neither file has any: photographs from near and far, and pictures that are no photographs.
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
