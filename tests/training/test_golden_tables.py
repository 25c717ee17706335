"""What trains, how fast and where it lies, for every parameter of the configs: any change shows here."""

import pytest

from tests.goldens.make_parameters import GOLDEN, VARIANTS, make_table


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_of_parameters_is_as_committed(variant):
    assert make_table(variant) == (GOLDEN / f"{variant}.txt").read_text(), (
        "if this change is meant, run `python -m tests.goldens.make parameters` and commit what it writes"
    )
