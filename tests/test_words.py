"""Sentences of docstrings and comments begin as English sentences do, with a verb or a noun."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lit_jax", "configs", "examples", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

# Their subject stands in another sentence, or nowhere: "Of which this is the sum."
FIRST_WORDS = re.compile(r"(?:^|[.:;!?]\s+)(Of|What|That|Those|How|Where|Whether)\b")


def prose(code: str) -> Iterator[str]:
    """Yield each docstring, and each block of comments on lines of their own."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            block.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.COMMENT) and block:
            yield " ".join(block)
            block = []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_sentence_begins_with_a_word_that_hides_its_subject(file):
    text = file.read_text(encoding="utf-8")
    found = [part for part in prose(text) if FIRST_WORDS.search(part)]
    assert not found, f"{len(found)}: {found[0]}"
