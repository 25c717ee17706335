import re

import pytest

from lit_jax.config import parse
from lit_jax.data.mixture import Mixture
from lit_jax.errors import UserError
from lit_jax.training.checks import check_negatives


def check(source, caplog, **changes) -> str:
    """What is said of batches from a source."""
    caplog.clear()
    check_negatives(parse({"data": {"train": {"path": "x"}}, **changes}), source)
    return caplog.text


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_batch_larger_than_the_data_is_told(caplog, loss):
    assert check(range(16), caplog, batch_size=16, loss=loss) == ""
    said = check(range(12), caplog, batch_size=16, loss=loss)
    for part in ("config.data.train ", " 12 ", "config.batch_size=16", " 4 "):
        assert part in said


def test_each_source_of_a_mixture_has_its_share_of_a_batch(caplog):
    data = {"mixture": {name: {"path": "x"} for name in ("small", "large")}}
    parts = {"small": range(10), "large": range(1000)}
    assert check(Mixture(parts, {}), caplog, batch_size=64, data=data) == ""
    said = check(Mixture(parts, {"small": 1.0, "large": 3.0}), caplog, batch_size=64, data=data)
    assert re.search(r"config\.data\.mixture\.small .*\b10 .*\b16 ", said)
    assert "large" not in said
    with pytest.raises(UserError, match=r"config\.data\.mixture"):
        check(Mixture({"one": range(1)}, {}), caplog, data=data)


def test_where_no_pair_has_a_negative_nothing_is_trained(caplog):
    with pytest.raises(UserError, match=r"config\.batch_size=1 .*config\.loss='softmax'"):
        check(range(100), caplog, batch_size=1)
    assert "config.batch_size=1" in check(range(100), caplog, batch_size=1, loss="sigmoid")
    for loss in ("softmax", "sigmoid"):
        with pytest.raises(UserError, match=r"config\.data\.train"):
            check(range(1), caplog, batch_size=8, loss=loss)


def test_a_text_that_learns_from_a_teacher_needs_no_negatives(caplog):
    assert check(range(1), caplog, batch_size=1, loss="mse") == ""
