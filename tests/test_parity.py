"""docs/parity.md says what is measured, and no figure in it or measured is above the bound."""

import re

import pytest

from tests import parity

pytestmark = pytest.mark.oracle


def test_every_figure_is_within_the_bound_and_on_the_page():
    import transformers

    transformers.logging.disable_progress_bar()
    errors = {
        case.name: {name: parity.measure(case, name) for name in parity.spellings_of(case)}
        for case in parity.cases()
    }
    for name, measured in errors.items():
        assert all(max(cell) <= parity.BOUND for cell in measured.values()), (name, measured)
    on_page = re.findall(r"^\|.*$", parity.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = parity.table(errors).splitlines()
    assert [without_figures(line) for line in on_page] == [
        without_figures(line) for line in expected
    ]
    figures = [float(x) for line in on_page for x in re.findall(FIGURE, line)]
    assert len(figures) == sum(2 * len(measured) for measured in errors.values())
    assert max(figures) <= parity.BOUND


FIGURE = r"\d\.\de[+-]\d\d"


def without_figures(line):
    return re.sub(FIGURE, "x", line)
