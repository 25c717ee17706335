"""Sphinx directives that read the reference from the code, so that it cannot differ from the code.

`config-keys` lists the keys of config dataclasses with type, default and the comment above each key.
`command-help` shows what a command prints for --help.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList


class ConfigKeys(Directive):
    """List the keys of a config dataclass and of the dataclasses that it holds.

    The arguments are the dotted name of the class and the prefix of its keys.
    """

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        root = getattr(importlib.import_module(module), name)
        found: list[nodes.Node] = []
        for prefix, group in groups(root, self.arguments[1], set()):
            title = _title(prefix, group)
            section = nodes.section(ids=[nodes.make_id(title)])
            section += nodes.title(text=title)
            self.parse(inspect.cleandoc(group.__doc__ or ""), section)
            for key in keys(group):
                self.parse(
                    f"```{{describe}} {prefix}.{key.name} = {key.default}\n{key.text}\n```", section
                )
            found.append(section)
        return found

    def parse(self, text: str, parent: nodes.Element) -> None:
        """Add Markdown to a node."""
        self.state.nested_parse(StringList(text.splitlines(), self.arguments[0]), 0, parent)


def _title(prefix: str, group: type) -> str:
    """Return the prefix of a group's keys, with the name that chooses the group where there is a choice."""
    names = typing.get_args(typing.get_type_hints(group).get("name"))
    return f"{prefix} ({prefix}.name={names[0]})" if len(names) == 1 else prefix


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config: `text` has its type and the comment above it."""

    name: str
    default: str
    text: str


def groups(group: type, prefix: str, seen: set[type]) -> Iterator[tuple[str, type]]:
    """Yield (prefix, dataclass) for a config dataclass and those that its fields hold, each class once."""
    if group in seen:
        return
    seen.add(group)
    yield prefix, group
    for field in dataclasses.fields(group):
        name = ".NAME" if typing.get_origin(field.type) is dict else ""
        for kind in (field.type, *typing.get_args(field.type)):
            if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
                yield from groups(kind, f"{prefix}.{field.name}{name}", seen)


def keys(group: type) -> list[Key]:
    """Return the keys of a config dataclass, also inherited ones, that are no dataclasses themselves."""
    classes = [kind for kind in reversed(group.__mro__) if dataclasses.is_dataclass(kind)]
    # A key that a subclass declares again stays where it was.
    return list({key.name: key for kind in classes for key in _own_keys(kind)}.values())


def _own_keys(group: type) -> list[Key]:
    lines = textwrap.dedent(inspect.getsource(group)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    found = []
    for line in body.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        kind, default = ast.unparse(line.annotation), line.value
        if default is None or kind.endswith("Config"):
            continue
        comment = " ".join(_comment_above(lines, line.lineno - 1))
        text = f"`{kind}`" + (f". {comment}" if comment else "")
        found.append(Key(line.target.id, _shown(default), text))
    return found


def _comment_above(lines: list[str], index: int) -> list[str]:
    comment = []
    while lines[index - 1].lstrip().startswith("#"):
        index -= 1
        comment.insert(0, lines[index].strip().removeprefix("#").strip())
    return comment


def _shown(default: ast.expr) -> str:
    """Return a default as a user would write it: a field's, not the call that makes the field."""
    if isinstance(default, ast.Call):
        named: dict[str | None, Any] = {word.arg: word.value for word in default.keywords}
        if "default_factory" in named:
            return {"dict": "{}", "list": "[]"}[ast.unparse(named["default_factory"])]
        if default.args:
            return ast.unparse(default.args[0])
    return ast.unparse(default)


class CommandHelp(Directive):
    """Show what a command prints for --help; the argument is its module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            importlib.import_module(self.arguments[0]).main(["--help"])
        return [nodes.literal_block(text=text.getvalue(), language="text")]


# Documents beside docs/ that are pages of the site, too. Their links work on a Git host and here.
OUTSIDE = {"../launch/README.md": "launch.md", "../benchmarks/RESULTS.md": "results.md"}


def link_inside(app: Any, document: str, source: list[str]) -> None:
    """Point links to the documents in `OUTSIDE` to their pages."""
    for file, page in OUTSIDE.items():
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def setup(app: Any) -> dict[str, bool]:
    """Register the directives; Sphinx calls this."""
    app.connect("source-read", link_inside)
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
