"""Copies of a bucket's objects: whole, up to date, made by one process, and told about in one sentence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lit_jax.cached_copies import Version, cache_copies
from lit_jax.config import SourceConfig
from lit_jax.data import copies
from lit_jax.data.copies import cached_copies
from lit_jax.data.files import locate
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from lit_jax.files import cache_folder
from tests.object_store.served import BUCKET, serve

STORES = ["s3://nobody:none", "gs://anonymous"]
FILES = {f"shard-{n}": np.random.default_rng(n).bytes(1000 + n) for n in range(20)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served") / "bucket") as store:
        store.folder.mkdir()
        yield store


@pytest.fixture
def store(served, tmp_path, monkeypatch):
    """An empty bucket, and an empty cache folder."""
    shutil.rmtree(served.folder)
    (served.folder / "data").mkdir(parents=True)
    for name, content in FILES.items():
        (served.folder / "data" / name).write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return served


def folder_in(store, scheme):
    return locate(store(f"{scheme}@{BUCKET}/data"))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def copies_in(scheme):
    """Return the folders of copies of the bucket's folder."""
    place = cache_folder() / "copies" / scheme[:2] / BUCKET / "data"
    return [path for path in place.glob("*") if path.is_dir()]


def downloads(store):
    return [entry["path"] for entry in store.log() if entry["method"] == "GET" and entry["sent"]]


@pytest.mark.parametrize("scheme", STORES)
def test_each_file_is_copied_once(store, scheme):
    folder = folder_in(store, scheme)
    local = cached_copies(folder, FILES)
    assert copies_in(scheme) == [local]
    assert contents(local) == FILES
    before = len(downloads(store))
    assert cached_copies(folder, FILES) == local
    assert len(downloads(store)) == before


@pytest.mark.parametrize("scheme", STORES)
def test_a_changed_object_is_copied_again_and_no_other(store, scheme):
    folder = folder_in(store, scheme)
    local = cached_copies(folder, FILES)
    inodes = {file.name: file.stat().st_ino for file in local.iterdir()}
    # Another content of the same size, and another size at the same time.
    changed = store.folder / "data" / "shard-3"
    changed.write_bytes(bytes(len(FILES["shard-3"])))
    os.utime(changed, (1e9, 1e9))
    longer = store.folder / "data" / "shard-4"
    when = longer.stat().st_mtime_ns
    longer.write_bytes(b"longer" * 1000)
    os.utime(longer, ns=(when, when))
    newer = cached_copies(folder, FILES)
    new = {"shard-3": changed.read_bytes(), "shard-4": longer.read_bytes()}
    assert contents(newer) == FILES | new
    again = {file.name for file in newer.iterdir() if file.stat().st_ino != inodes[file.name]}
    assert again == {*new}
    # A running reader of the older copy opens its files at any time.
    assert contents(local) == FILES


def test_two_servers_with_the_same_names_sizes_and_times_have_copies_of_their_own(store, tmp_path):
    with serve(tmp_path / "other") as other:
        (other.folder / "data").mkdir(parents=True)
        for one, content in (store, b"first"), (other, b"other"):
            file = one.folder / "data" / "shard-0"
            file.write_bytes(content)
            os.utime(file, (1e9, 1e9))
        first, second = (
            cached_copies(folder_in(s, STORES[0]), ["shard-0"]) for s in (store, other)
        )
    assert (first / "shard-0").read_bytes() == b"first"
    assert (second / "shard-0").read_bytes() == b"other"


def test_a_link_that_a_killed_command_left_is_not_written_through(store):
    folder = folder_in(store, STORES[0])
    local = cached_copies(folder, FILES)
    (store.folder / "data" / "shard-3").write_bytes(b"new")
    newer = cached_copies(folder, FILES)
    (newer / "shard-3").unlink()
    (newer / ".shard-3.new").hardlink_to(local / "shard-3")
    cached_copies(folder, FILES)
    assert (newer / "shard-3").read_bytes() == b"new"
    assert contents(local) == FILES


def version(content):
    return Version(len(content), 10**9)


def test_an_error_ends_the_downloads_that_are_under_way(store):
    ended = []

    def fetch(name, local, count):
        if name == "bad":
            time.sleep(0.1)
            raise OSError(errno.EIO, "no answer in time")
        for _ in range(600):
            time.sleep(0.01)
            try:
                count(0)
            except Exception:
                ended.append(name)
                raise

    start = time.monotonic()
    with pytest.raises(UserError, match="no answer in time"):
        cache_copies("gs://b/p", "", dict.fromkeys(["a", "b", "bad", "c"], version(b"x")), fetch)
    assert time.monotonic() - start < 3
    assert sorted(ended) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "no space"), "larger disk"),
        (OSError(errno.EDQUOT, "quota"), "larger disk"),
        (PermissionError(errno.EACCES, "denied", "/folder"), "XDG_CACHE_HOME.*can be written"),
        (OSError(errno.EIO, "denied", "gs://b/p/x"), "credentials"),
        (OSError(errno.EACCES, "denied"), "credentials"),
    ],
)
def test_an_error_of_the_disk_and_one_of_the_store_have_their_own_remedies(store, error, remedy):
    def fetch(name, local, count):
        raise error

    with pytest.raises(UserError, match=remedy):
        cache_copies("gs://b/p", "", {"x": version(b"x")}, fetch)


def test_a_download_that_ends_early_is_told_apart_from_a_change(store):
    def fetch(name, local, count):
        local.write_bytes(b"abc")
        return version(b"abcdef")

    with pytest.raises(UserError, match="gs://b/p/x ended after 3 of 6"):
        cache_copies("gs://b/p", "", {"x": version(b"abcdef")}, fetch)


@pytest.mark.parametrize("scheme", STORES)
def test_a_store_that_fails_now_and_then_is_asked_again(store, scheme):
    address = store(f"{scheme}@{BUCKET}/data").replace("limit_seconds=3", "limit_seconds=30")
    with store.faults(errors=0.05, delay=0.01, seed=3, where="shard"):
        local = cached_copies(locate(address), FILES)
    assert contents(local) == FILES
    assert 503 in {entry["status"] for entry in store.log()}


@pytest.mark.long
@pytest.mark.parametrize("scheme", STORES)
def test_a_download_that_ends_in_the_middle_is_no_copy(store, scheme):
    with store.faults(broken=1.0, where="shard-7"), pytest.raises(UserError) as raised:
        cached_copies(folder_in(store, scheme), FILES)
    (local,) = copies_in(scheme)
    assert f"{scheme[:2]}://{BUCKET}/data" in str(raised.value)
    assert "shard-7" not in contents(local)
    assert contents(local).items() <= FILES.items()
    assert contents(cached_copies(folder_in(store, scheme), FILES)) == FILES


def test_what_has_gone_from_the_bucket_is_not_read_from_its_copy(store):
    folder = folder_in(store, STORES[0])
    cached_copies(folder, FILES)
    (store.folder / "data" / "shard-5").unlink()
    with pytest.raises(UserError, match=f"s3://{BUCKET}/data/shard-5"):
        cached_copies(folder, FILES)


def test_an_object_that_changes_while_it_is_copied_is_refused(store, monkeypatch):
    folder, fetch = folder_in(store, STORES[0]), copies._fetch

    def fetch_slowly(folder, name, *others):
        found = fetch(folder, name, *others)
        if name != "shard-2":
            return found
        (store.folder / "data" / name).write_bytes(b"new")
        return fetch(folder, name, *others)

    monkeypatch.setattr(copies, "_fetch", fetch_slowly)
    with pytest.raises(UserError, match=f"s3://{BUCKET}/data/shard-2"):
        cached_copies(folder, FILES)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd"])
def test_a_name_outside_of_the_folder_is_refused(store, name, tmp_path):
    row = {"name": name, "count": 1}
    (store.folder / "data" / "records.json").write_text(json.dumps({"version": 1, "shards": [row]}))
    (store.folder / "secret").write_text("x")
    with pytest.raises(UserError, match=name):
        open_source(SourceConfig(path=store(f"{STORES[0]}@{BUCKET}/data")))


def test_too_small_a_disk_is_told_before_anything_is_copied(store, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 12_000)
    )
    with pytest.raises(UserError, match=r"0\.02 MB .* 0\.01 MB .*XDG_CACHE_HOME"):
        cached_copies(folder_in(store, STORES[0]), FILES)
    assert [contents(folder) for folder in copies_in("s3")] == [{}]


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "lit_jax").write_text("a file in the way")
    with pytest.raises(UserError, match=rf"{tmp_path}/lit_jax.*XDG_CACHE_HOME"):
        cached_copies(folder_in(store, STORES[0]), FILES)


COPY = """
import logging, sys
from lit_jax.data.copies import cached_copies
from lit_jax.data.files import locate
logging.basicConfig(level=logging.INFO)
print(cached_copies(locate(sys.argv[1]), sys.argv[2:]))
"""


def start(store):
    address = store(f"{STORES[0]}@{BUCKET}/data")
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", COPY, address, *FILES], stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.long
def test_one_of_two_processes_copies(store):
    before = len(downloads(store))
    with store.faults(delay=0.2, where="shard"):
        ends = [process.communicate() for process in [start(store), start(store)]]
    assert len(downloads(store)) - before == len(FILES), ends
    assert ends[0][0] == ends[1][0]
    assert [contents(folder) for folder in copies_in("s3")] == [FILES]


@pytest.mark.long
def test_a_killed_copy_is_finished_by_the_next_command(store):
    before = len(downloads(store))
    with store.faults(delay=1.0, where="shard"):
        process = start(store)
        while len(downloads(store)) < before + 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (local,) = copies_in("s3")
    there = {name for name in contents(local) if not name.startswith(".")}
    assert there < {*FILES}
    output, errors = start(store).communicate()
    assert output == f"{local}\n", errors
    assert f"Copying {len(FILES) - len(there)} files" in errors
    assert {n: c for n, c in contents(local).items() if not n.startswith(".")} == FILES
