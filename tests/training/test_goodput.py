"""The time of a run adds up to the time on the wall, also over several starts."""

import contextlib
import time

import pytest

from lit_jax.training.goodput import Stopwatch, resumed
from lit_jax.training.metrics import noted_start, read_metrics
from lit_jax.training.passed import Passed


def total(seconds):
    return sum(seconds.values())


def test_each_moment_has_one_kind():
    began = time.monotonic()
    stopwatch = Stopwatch({"step": 5.0}, 2.0)
    time.sleep(0.02)
    with stopwatch.timing("step"):
        time.sleep(0.02)
        with contextlib.suppress(KeyError), stopwatch.timing("evaluation"):
            time.sleep(0.02)
            raise KeyError
        time.sleep(0.02)
    seconds = stopwatch.seconds()
    assert total(seconds) == pytest.approx(7 + time.monotonic() - began, abs=1e-3)
    assert seconds["startup"] >= 2.02
    assert seconds["step"] >= 5.04
    assert seconds["evaluation"] >= 0.02
    assert seconds["lost"] == 0


def test_a_start_continues_from_the_row_of_its_checkpoint_and_the_rest_is_lost():
    now = time.time()
    rows = [
        {"step": 2, "time": now - 80, "seconds/startup": 1.0, "seconds/step": 19.0},
        {"step": 4, "time": now - 60, "seconds/startup": 1.0, "seconds/step": 40.0},
        {"step": 6, "time": now - 40, "seconds/startup": 1.0, "seconds/step": 60.0},
    ]
    resume = {"total": 8, "begun": 3.0}
    seconds = resumed(rows, 4, **resume).seconds()
    assert seconds["step"] == 40
    assert seconds["lost"] == pytest.approx(57, abs=0.5)
    assert seconds["startup"] == pytest.approx(4, abs=0.5)
    assert resumed(rows, 0, **resume).seconds()["lost"] == pytest.approx(97, abs=0.5)
    assert resumed(rows, 6, total=6, begun=0.0).seconds()["lost"] == 0
    rows[1]["finished"] = 1.0
    # The extension was killed before its first checkpoint; it had begun 20 seconds before its row.
    assert resumed(rows, 4, **resume).seconds()["lost"] == pytest.approx(57, abs=0.5)
    assert resumed(rows[:2], 4, **resume).seconds()["lost"] == 0
    assert total(resumed([{"step": 4, "loss": 1.0}], 4, **resume).seconds()) < 3.5


def test_before_the_first_row_the_time_since_the_first_start_is_lost():
    now = time.time()
    resume = {"total": 8, "begun": 3.0}
    assert resumed([], 0, **resume, first_begun=now - 40).seconds()["lost"] == pytest.approx(
        37, abs=0.5
    )
    assert total(resumed([], 0, **resume).seconds()) == pytest.approx(3, abs=0.5)
    # The rows were dropped, because there was no checkpoint, and the next start was killed, too.
    later = [{"step": 2, "time": now - 20, "seconds/step": 5.0}]
    seconds = resumed(later, 0, **resume, first_begun=now - 40).seconds()
    assert seconds["lost"] == pytest.approx(37, abs=0.5)
    assert seconds["step"] == 0


def test_the_time_of_a_start_is_noted_until_an_error_comes_before_its_first_row(tmp_path):
    began, row = time.time(), '{"step": 1}\n'
    with pytest.raises(KeyError), noted_start(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with noted_start(tmp_path) as first:
        assert first is None
    # An error of the second start does not undo what the first one has noted.
    with pytest.raises(KeyError), noted_start(tmp_path):
        raise KeyError
    with noted_start(tmp_path) as first:
        assert first == pytest.approx(began, abs=5)
    for text in ("", "{", "[]", '{"time": null}', row):
        (tmp_path / "begun.json").write_text(text)
        with noted_start(tmp_path) as first:
            assert first is None
        (tmp_path / "begun.json").write_text(text)
    # A run that has rows began at another time.
    (tmp_path / "begun.json").unlink()
    (tmp_path / "metrics.jsonl").write_text(row)
    with noted_start(tmp_path) as first:
        assert first is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_broke_off_accounts_for_its_time(train, tiny, tmp_path):
    config = tiny(**{"checkpoint.every": "2 steps", "log.every": "100 steps"})
    began = time.time()

    def breaks_off(model):
        raise KeyError

    with pytest.raises(KeyError):
        train(config, tmp_path, passed=Passed(callbacks=(("3 steps", breaks_off),)))
    time.sleep(0.5)
    first = read_metrics(tmp_path)
    assert [row["step"] for row in first] == [1, 2]
    train(config, tmp_path)
    last = read_metrics(tmp_path)[-1]
    seconds = {key: value for key, value in last.items() if key.startswith("seconds/")}
    assert total(seconds) == pytest.approx(time.time() - began, rel=0.02)
    assert seconds["seconds/lost"] >= 0.5
    assert all(value > 0 for key, value in seconds.items() if key != "seconds/evaluation")
    assert last["goodput"] == pytest.approx(seconds["seconds/step"] / total(seconds))
