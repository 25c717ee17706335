"""Texts of users on pages, in figures and on terminals."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.display import printable, valid_unicode

ANY_TEXT = st.text(st.characters(codec=None))  # also halves of surrogate pairs


@given(ANY_TEXT)
def test_every_text_is_one_line_of_xml(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert len(shown) == len(valid_unicode(text))
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;")
    assert ElementTree.fromstring(f"<t>{escaped}</t>".encode()).text == (shown or None)
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("smile \ud83d here", "smile \ufffd here"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("bell \x07 and \x00, \x1b[31mred", "bell \ufffd and \ufffd, \ufffd[31mred"),
        ("two\nlines\r\nand a\ttab\x85", "two lines  and a tab "),
        ("\x7f\x9b\ufffe", "\ufffd\ufffd\ufffd"),
        # A Hebrew word between marks of direction, a family joined by zero-width joiners, a soft hyphen.
        (
            "\u202bדג\u202c 👨\u200d👩\u200d👧 a\u00adb",
            "\u202bדג\u202c 👨\u200d👩\u200d👧 a\u00adb",
        ),
    ],
)
def test_only_what_cannot_be_shown_is_replaced(text, shown):
    assert printable(text) == shown
