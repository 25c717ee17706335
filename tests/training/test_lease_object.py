"""The lease of a run folder in a bucket, on the emulated stores of Google and Amazon."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from lit_jax.buckets import BucketPath
from lit_jax.errors import UserError
from lit_jax.training import lease, lease_object, lease_wait
from tests.object_store.served import BUCKET, READONLY, serve


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "bucket"
    folder.mkdir()
    with serve(folder) as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        yield served


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(lease_wait, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lease_wait, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(lease_wait, "RENEW_SECONDS", 0.1)
    often = {"max_retries": 1000, "initial_delay": "1ms", "max_delay": "20ms"}
    monkeypatch.setattr(lease_object, "_RETRIES", often)
    monkeypatch.setattr(lease_object.ObjectLease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease_object.ObjectLease, "POLL_SECONDS", 0.05)


@pytest.fixture(params=["gs", "s3"])
def workdir(request, store, soon):
    folder = epath.Path(f"{request.param}://{BUCKET}/{request.node.originalname}")
    yield folder
    assert not stored(store, folder).exists()


def stored(store, workdir):
    return store.folder / workdir.name / ".lease"


def foreign(store, workdir, locks="another"):
    """Write a lease as the process of another machine does that has ended since."""
    path = stored(store, workdir)
    path.parent.mkdir(exist_ok=True)
    holder = {"host": "elsewhere", "pid": 7, "locks": locks, "token": "t", "beat": 1}
    path.write_text(json.dumps(holder))
    return path


@pytest.mark.parametrize("where", ["here", "on another machine"])
def test_a_second_run_is_refused_while_the_first_one_lives(workdir, store, monkeypatch, where):
    if where == "on another machine":
        # Renewals alone tell.
        monkeypatch.setattr(lease_object, "_kernel", lambda: None)
    with lease.holding(workdir):
        first = json.loads(stored(store, workdir).read_text())
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"process {first['pid']} on"), lease.holding(workdir):
            pass
        assert time.monotonic() - start < lease_wait.STALE_SECONDS
        lease.check_lease(workdir)
    with lease.holding(workdir):
        lease.check_lease(workdir)


def test_a_silent_lease_is_taken_over_after_a_while(workdir, store, caplog):
    foreign(store, workdir)
    start = time.monotonic()
    with caplog.at_level("WARNING", logger="lit_jax"), lease.holding(workdir):
        assert time.monotonic() - start >= lease_wait.STALE_SECONDS
        assert "process 7 on elsewhere" in caplog.text
        lease.check_lease(workdir)


def test_a_lease_of_a_process_of_this_machine_that_has_ended_is_taken_over_at_once(workdir, store):
    foreign(store, workdir, f"{lease_object._kernel()}/{workdir}")
    start = time.monotonic()
    with lease.holding(workdir):
        assert time.monotonic() - start < lease_wait.STALE_SECONDS


def test_a_copy_of_a_folder_in_use_is_free_after_a_while(workdir, store):
    with lease.holding(workdir):
        copy = workdir.parent / f"{workdir.name}_copied"
        stored(store, copy).parent.mkdir(exist_ok=True)
        stored(store, copy).write_bytes(stored(store, workdir).read_bytes())
        with lease.holding(copy):
            lease.check_lease(copy)
            lease.check_lease(workdir)


def test_of_two_that_come_at_once_one_gets_the_folder(workdir, store):
    foreign(store, workdir)
    done = threading.Event()

    def take(_):
        try:
            with lease.holding(workdir):
                done.wait(2)
                return "held"
        except UserError:
            done.set()
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(take, range(2))) == ["held", "refused"]


def test_a_holder_that_was_overtaken_stops_before_its_next_write(workdir, store):
    with lease.holding(workdir):
        path = foreign(store, workdir)
        time.sleep(lease_object.ObjectLease.LOOK_SECONDS)
        with pytest.raises(UserError, match="taken over by process 7 on elsewhere"):
            lease.check_lease(workdir)
    assert json.loads(path.read_text())["pid"] == 7
    path.unlink()


def test_libraries_change_nothing_below_a_folder_that_is_lost(store, soon):
    """Orbax writes in threads of its own, between two checks of the loop."""
    workdir = BucketPath(f"gs://{BUCKET}/lost")
    file = epath.Path(f"{workdir}/checkpoints/4/file")
    with lease.holding(workdir):
        file.write_text("whole")
        path = foreign(store, workdir)
        time.sleep(lease_object.ObjectLease.LOOK_SECONDS)
        for change in (
            lambda: file.write_text("lost"),
            lambda: file.open("w"),
            file.unlink,
            file.parent.rmtree,
        ):
            with pytest.raises(UserError, match="process 7 on elsewhere"):
                change()
        assert file.open().read() == "whole"
    file.parent.rmtree()
    path.unlink()


def test_a_lease_that_a_person_has_removed_is_not_written_again(workdir, store):
    with lease.holding(workdir):
        # A renewal may be under way.
        while stored(store, workdir).exists():
            stored(store, workdir).unlink()
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"{workdir} has no lease"):
            lease.check_lease(workdir)


def test_lost_answers_and_refusals_for_a_moment_are_no_loss(workdir, store):
    with store.faults(lost=0.4, errors=0.2, delay=0.02, seed=3), lease.holding(workdir):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            lease.check_lease(workdir)
            time.sleep(0.02)


def test_a_store_that_does_not_answer_stops_the_writer_before_another_may_take_the_folder(
    soon, store, monkeypatch
):
    workdir = epath.Path(f"gs://{BUCKET}/silent")
    monkeypatch.setattr(lease_object, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(lease_wait, "STALE_SECONDS", 1.0)
    with lease.holding(workdir):
        with store.faults(errors=1.0):
            time.sleep(0.15)
            lease.check_lease(workdir)
            time.sleep(lease_wait.STALE_SECONDS)
            with pytest.raises(UserError, match=rf"{workdir} could not be renewed .*no answer"):
                lease.check_lease(workdir)
        time.sleep(0.5)
        lease.check_lease(workdir)


def test_expired_credentials_are_named(workdir, store):
    with lease.holding(workdir):
        with store.faults(is_expired=True):
            time.sleep(lease_wait.STALE_SECONDS)
            with pytest.raises(UserError, match=r"Invalid Credentials|ExpiredToken") as raised:
                lease.check_lease(workdir)
        assert "\n" not in str(raised.value)
        assert "http" not in str(raised.value)
        time.sleep(0.3)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("bucket", [READONLY, "elsewhere"])
def test_a_bucket_that_cannot_be_written_is_an_error(store, soon, scheme, bucket):
    with (
        pytest.raises(OSError, match=r"PERMISSION_DENIED|NOT_FOUND|not exist"),
        lease.holding(epath.Path(f"{scheme}://{bucket}/run")),
    ):
        pass


def test_many_checks_make_few_requests(store, monkeypatch):
    workdir = epath.Path(f"gs://{BUCKET}/often")
    with lease.holding(workdir):
        before = len(store.log())
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            lease.check_lease(workdir)
        assert len(store.log()) - before <= 2
