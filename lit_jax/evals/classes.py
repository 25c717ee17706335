"""The names of classes and the sentences about them."""

import dataclasses
import re
from collections.abc import Mapping

PLACEHOLDER = re.compile(r"\{c?\}")

# The templates where neither file has any: photographs from near and far, and pictures that are none.
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
# The templates in any other language.
BARE_NAME = ("{}",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The names of C classes, and T templates: sentences with '{}' or '{c}' in the name's place.

    Attributes:
        prompts: of each class, sentences of its own in the place of the templates.
        labels: what the data set calls the classes, in the same order; if empty, by these names or by
            their positions in them.
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
    # A function, since a name may contain \1.
    return PLACEHOLDER.sub(lambda _: name, template)
