"""A profile holds the steps that were asked for, and XProf opens it."""

import json

import jax
import pytest

from lit_jax.errors import Preempted
from lit_jax.training.metrics import read_metrics
from tests.training.conftest import stop_after


def profiles(workdir):
    return sorted((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def steps_in(file):
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return {dict(event.stats)["step_num"] for event in events if event.name == "train"}


def test_a_profile_has_the_steps_of_its_range_and_no_others(train, tiny, tmp_path):
    train(tiny(**{"log.profile": "3:4"}), tmp_path)
    (file,) = profiles(tmp_path)
    assert steps_in(file) == {3, 4}
    assert read_metrics(tmp_path)[-1]["seconds/evaluation"] > 0


def test_a_run_that_stops_in_the_range_writes_what_there_is_and_goes_on(
    train, tiny, tmp_path, monkeypatch
):
    config = tiny(**{"log.profile": "3:5"})
    stop_after(monkeypatch, 4)
    with pytest.raises(Preempted):
        train(config, tmp_path)
    monkeypatch.undo()
    train(config, tmp_path)
    assert [steps_in(file) for file in profiles(tmp_path)] == [{3, 4}, {5}]


@pytest.mark.long
@pytest.mark.oracle
def test_xprof_shows_our_step_and_our_operations(train, tiny, tmp_path):
    from xprof.convert import raw_to_tool_data

    train(tiny(**{"log.profile": "3:4"}), tmp_path)
    names = [str(file) for file in profiles(tmp_path)]
    shown, _ = raw_to_tool_data.xspace_to_tool_data(names, "trace_viewer", {})
    events = json.loads(shown)["traceEvents"]
    assert {event["name"] for event in events if event.get("name", "").startswith("train ")} == {
        "train 3",
        "train 4",
    }
    # The products of our towers, under the name of our step.
    ours = [
        event for event in events if event.get("args", {}).get("hlo_module") == "jit_train_step"
    ]
    assert any("dot" in event["args"]["hlo_op"] for event in ours)
