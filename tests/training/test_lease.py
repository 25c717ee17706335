"""Whose a run folder is: real processes that start, are killed and are suspended."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.training import lease
from lit_jax.training.disk import writing

SCRIPT = Path(__file__).with_name("holder_of_a_folder.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def holder():
    started = []

    def start(workdir):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, workdir],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def foreign(workdir, number, beat=0):
    """A lease as another machine leaves it; its clock is an hour ahead."""
    workdir.mkdir(exist_ok=True)
    holder = {"host": "elsewhere", "pid": 7, "kernel": "another", "token": "t", "beat": beat}
    path = workdir / f".lease.{number}"
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() + 3600,) * 2)


def test_two_runs_do_not_share_a_folder_and_a_killed_one_does_not_block_it(holder, tmp_path):
    workdir = tmp_path / "run"
    first = holder(workdir)
    assert first.stdout.readline() == "held\n"
    second = holder(workdir)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == BAD_INPUT
    assert f"is in use by process {first.pid} on {platform.node()};" in errors
    first.kill()
    third = holder(workdir)
    assert third.stdout.readline() == "held\n"
    _, errors = third.communicate("file\n", timeout=100)
    assert third.returncode == 0
    assert errors == ""  # it has not waited for the lease to grow old
    assert [path.name for path in workdir.iterdir()] == ["file"]


def test_a_suspended_process_that_has_lost_the_folder_writes_nothing_more(holder, tmp_path):
    workdir = tmp_path / "run"
    process = holder(workdir)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    foreign(workdir, 2)
    time.sleep(0.5)
    process.stdin.write("file\n")
    process.stdin.flush()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == BAD_INPUT
    assert "was taken over by process 7 on elsewhere" in errors
    assert {path.name for path in workdir.iterdir()} == {".lease.1", ".lease.2"}


def test_a_lease_of_another_machine_is_waited_for_by_what_changes_and_not_by_clocks(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "GRACE_SECONDS", 0.1)
    foreign(tmp_path, 3)
    start = time.monotonic()
    with caplog.at_level("WARNING", logger="lit_jax"), lease.holding(tmp_path):
        assert time.monotonic() - start >= 1.0
        assert "in use by process 7 on elsewhere; if that does not change" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == [".lease.4"]
    assert list(tmp_path.iterdir()) == []
    foreign(tmp_path, 1)
    renewal = threading.Timer(0.5, foreign, (tmp_path, 1, 1))
    renewal.start()
    with (
        pytest.raises(UserError, match="is in use by process 7 on elsewhere"),
        lease.holding(tmp_path),
    ):
        pass
    renewal.join()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_lease_is_one_of_an_unknown_process(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "GRACE_SECONDS", 0.1)
    (tmp_path / ".lease.1").write_text(content)
    (tmp_path / ".lease.x").write_text("")
    with lease.holding(tmp_path):
        assert (tmp_path / ".lease.2").exists()


def test_a_lease_that_cannot_be_renewed_stops_the_writer_before_another_may_take_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    with lease.holding(tmp_path / "run"):
        monkeypatch.setattr(lease, "_newest", broken)
        with writing(tmp_path / "run"):
            pass  # not yet
        time.sleep(0.5)
        with pytest.raises(UserError, match=r"could not be renewed for .*Input/output error"):
            lease.check_lease(tmp_path / "run")


def broken(workdir):
    raise OSError(5, "Input/output error")


def test_a_folder_that_stays_empty_is_removed_again(tmp_path):
    with lease.holding(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / ".lease.1").exists()
    assert list(tmp_path.iterdir()) == []
