"""Whose a run folder is: real processes that start, are killed and are suspended."""

import fcntl
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.training import lease, lease_file, lease_wait
from lit_jax.training.workdir_errors import workdir_errors

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


def foreign(workdir, number, beat=0, locks="another"):
    """A lease as another machine leaves it; its clock is an hour ahead."""
    workdir.mkdir(exist_ok=True)
    holder = {"host": "elsewhere", "pid": 7, "locks": locks, "token": "t", "beat": beat}
    new, path = workdir.with_name(f"{workdir.name}.new"), workdir / f".lease.{number}"
    new.write_text(json.dumps(holder))
    os.utime(new, (time.time() + 3600,) * 2)
    # Nobody reads half of it.
    return new.replace(path)


def test_two_runs_do_not_share_a_folder_and_a_killed_one_does_not_block_it(holder, tmp_path):
    workdir = tmp_path / "run"
    both = [holder(workdir) for _ in range(2)]
    while not (ended := [process for process in both if process.poll() is not None]):
        time.sleep(0.05)
    (second,) = ended
    (first,) = (process for process in both if process is not second)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == BAD_INPUT
    assert first.stdout.readline() == "held\n"
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
    monkeypatch.setattr(lease_wait, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease_wait, "GRACE_SECONDS", 0.1)
    foreign(tmp_path, 3)
    start = time.monotonic()
    with caplog.at_level("WARNING", logger="lit_jax"), lease.holding(tmp_path):
        assert time.monotonic() - start >= 1.0
        assert "process 7 on elsewhere" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == [".lease.4"]
    assert list(tmp_path.iterdir()) == []


def test_a_lease_of_another_machine_that_is_renewed_is_in_use(tmp_path):
    ended = threading.Event()

    def renew():
        for beat in itertools.count():
            foreign(tmp_path, 1, beat)
            if ended.wait(0.3):
                return

    foreign(tmp_path, 1)
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    with (
        pytest.raises(UserError, match="process 7 on elsewhere"),
        lease.holding(tmp_path),
    ):
        pass
    ended.set()
    renewing.join()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(lease_wait, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lease_wait, "GRACE_SECONDS", 0.1)


def kept_for_a_while(workdir):
    start = time.monotonic()
    with lease.holding(workdir):
        return time.monotonic() - start >= lease_wait.STALE_SECONDS


def test_locks_count_only_where_both_processes_see_the_same_ones(tmp_path, soon):
    """One folder may be mounted twice on a machine, and a server may keep the lock of a dead machine."""
    path = foreign(tmp_path, 1)
    with path.open() as file:
        own = lease_file._lock_domain(file.fileno())
    kernel, device = own.split("/")
    foreign(tmp_path, 1, locks=f"{kernel}/{device}9")
    assert kept_for_a_while(tmp_path)
    path = foreign(tmp_path, 1)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert kept_for_a_while(tmp_path)
        foreign(tmp_path, 1, locks=own)
        fcntl.flock(file, fcntl.LOCK_UN)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="process 7 on elsewhere"),
            lease.holding(tmp_path),
        ):
            pass


def test_the_copy_of_a_run_folder_that_is_in_use_is_nobodys(tmp_path):
    with lease.holding(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert not kept_for_a_while(tmp_path / "copy")


def test_a_lease_that_a_person_has_removed_ends_the_run_before_its_next_write(tmp_path):
    with lease.holding(tmp_path / "run"):
        (tmp_path / "run" / ".lease.1").unlink()
        with (
            pytest.raises(UserError, match=rf"{tmp_path}/run "),
            workdir_errors(tmp_path / "run"),
        ):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_lease_is_one_of_an_unknown_process(tmp_path, soon, content):
    (tmp_path / ".lease.1").write_text(content)
    (tmp_path / ".lease.x").write_text("")
    with lease.holding(tmp_path):
        assert (tmp_path / ".lease.2").exists()


def test_a_lease_that_cannot_be_renewed_stops_the_writer_before_another_may_take_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lease_wait, "RENEW_SECONDS", 0.05)
    with lease.holding(tmp_path / "run"):
        monkeypatch.setattr(lease_file, "_newest", broken)
        # Nobody takes it over before it is stale.
        with workdir_errors(tmp_path / "run"):
            pass
        time.sleep(0.5)
        monkeypatch.setattr(lease_wait, "STALE_SECONDS", 0.3)
        with pytest.raises(UserError, match=r"Input/output error"):
            lease.check_lease(tmp_path / "run")


def broken(workdir):
    raise OSError(5, "Input/output error")


def test_a_folder_that_stays_empty_is_removed_again(tmp_path):
    with lease.holding(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / ".lease.1").exists()
    assert list(tmp_path.iterdir()) == []
