"""All processes hear the alarm after the same step, by the clock of the first one."""

import itertools
import types

import jax
import numpy as np
import pytest

from lit_jax.distributed import alarm
from lit_jax.distributed.alarm import Alarm


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(alarm.time, "monotonic", lambda: now.seconds)
    return now


def ring(ours, clock, seconds_of_step):
    """The step after which the alarm rings."""
    for step in itertools.count(1):
        clock.seconds += seconds_of_step(step)
        if ours.rings(step):
            return step
    raise AssertionError


def test_a_process_alone_hears_it_in_the_first_step_after_the_time(clock):
    ours = Alarm(10.0, 0)
    assert ring(ours, clock, lambda step: 0.3) == 34
    ours.restart(34)
    clock.seconds += 9.9
    assert not ours.rings(35)
    clock.seconds += 0.2
    assert ours.rings(36)


def test_without_a_time_it_never_rings(clock):
    ours = Alarm(None, 0)
    clock.seconds = 1e9
    assert not ours.rings(1)


@pytest.mark.parametrize(
    ("pace", "latest"),
    [
        (lambda step: 0.1, 60.2),
        # The first step is only dispatched.
        (lambda step: 0.001 if step == 1 else 0.5, 61.0),
        (lambda step: 0.01 if step < 1000 else 0.03, 80.0),
        (lambda step: 0.1 if step < 100 else 0.001, 60.1),
    ],
)
def test_several_processes_agree_at_few_steps(clock, monkeypatch, pace, latest):
    asked = []

    def broadcast(steps):
        asked.append(int(steps))
        return np.int32(steps)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(alarm.multihost_utils, "broadcast_one_to_all", broadcast)
    step = ring(Alarm(60.0, 0), clock, pace)
    assert 60 <= clock.seconds < latest
    assert len(asked) < 40 < step
    # The process whose own clock says something else takes the answer of the first.
    answers = iter(asked)
    monkeypatch.setattr(
        alarm.multihost_utils, "broadcast_one_to_all", lambda _: np.int32(next(answers))
    )
    assert ring(Alarm(5.0, 0), clock, lambda step: 1.0) == step
