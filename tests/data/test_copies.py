"""Copies of a bucket's objects: whole, up to date, made by one process, and told about in one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lit_jax.config import SourceConfig
from lit_jax.data import copies
from lit_jax.data.copies import local_copies
from lit_jax.data.files import locate
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from lit_jax.kept_copies import copies_of
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


def downloads(store):
    return [entry["path"] for entry in store.log() if entry["method"] == "GET" and entry["sent"]]


@pytest.mark.parametrize("scheme", STORES)
def test_each_file_is_copied_once(store, scheme):
    folder = folder_in(store, scheme)
    local = local_copies(folder, FILES)
    assert local == copies_of(f"{scheme[:2]}://{BUCKET}/data")
    assert contents(local) == FILES
    before = len(downloads(store))
    assert local_copies(folder, FILES) == local
    assert len(downloads(store)) == before


@pytest.mark.parametrize("scheme", STORES)
def test_a_changed_object_is_copied_again_and_no_other(store, scheme):
    folder = folder_in(store, scheme)
    local = local_copies(folder, FILES)
    times = {file.name: file.stat().st_ctime_ns for file in local.iterdir()}
    # Another content of the same size, and another size at the same time.
    changed = store.folder / "data" / "shard-3"
    changed.write_bytes(bytes(len(FILES["shard-3"])))
    os.utime(changed, (1e9, 1e9))
    longer = store.folder / "data" / "shard-4"
    when = longer.stat().st_mtime_ns
    longer.write_bytes(b"longer" * 1000)
    os.utime(longer, ns=(when, when))
    local_copies(folder, FILES)
    new = {"shard-3": changed.read_bytes(), "shard-4": longer.read_bytes()}
    assert contents(local) == FILES | new
    again = {file.name for file in local.iterdir() if file.stat().st_ctime_ns != times[file.name]}
    assert again - {".lock"} == {*new}


@pytest.mark.parametrize("scheme", STORES)
def test_a_store_that_fails_now_and_then_is_asked_again(store, scheme):
    address = store(f"{scheme}@{BUCKET}/data").replace("limit_seconds=3", "limit_seconds=30")
    with store.faults(errors=0.05, delay=0.01, seed=3, where="shard"):
        local = local_copies(locate(address), FILES)
    assert contents(local) == FILES
    assert 503 in {entry["status"] for entry in store.log()}


@pytest.mark.long
@pytest.mark.parametrize("scheme", STORES)
def test_a_download_that_ends_in_the_middle_is_no_copy(store, scheme):
    with store.faults(broken=1.0, where="shard-7"), pytest.raises(UserError) as raised:
        local_copies(folder_in(store, scheme), FILES)
    local = copies_of(f"{scheme[:2]}://{BUCKET}/data")
    assert f"{scheme[:2]}://{BUCKET}/data" in str(raised.value)
    assert "shard-7" not in contents(local)
    assert contents(local).items() <= FILES.items()
    assert contents(local_copies(folder_in(store, scheme), FILES)) == FILES


def test_what_has_gone_from_the_bucket_is_not_read_from_its_copy(store):
    folder = folder_in(store, STORES[0])
    local_copies(folder, FILES)
    (store.folder / "data" / "shard-5").unlink()
    with pytest.raises(UserError, match=f"s3://{BUCKET}/data/shard-5"):
        local_copies(folder, FILES)


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
        local_copies(folder, FILES)


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
        local_copies(folder_in(store, STORES[0]), FILES)
    assert contents(copies_of(f"s3://{BUCKET}/data")) == {}


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "lit_jax").write_text("a file in the way")
    with pytest.raises(UserError, match=rf"{tmp_path}/lit_jax.*XDG_CACHE_HOME"):
        local_copies(folder_in(store, STORES[0]), FILES)


COPY = """
import logging, sys
from lit_jax.data.copies import local_copies
from lit_jax.data.files import locate
logging.basicConfig(level=logging.INFO)
print(local_copies(locate(sys.argv[1]), sys.argv[2:]))
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
    assert contents(copies_of(f"s3://{BUCKET}/data")) == FILES


@pytest.mark.long
def test_a_killed_copy_is_finished_by_the_next_command(store):
    before = len(downloads(store))
    local = copies_of(f"s3://{BUCKET}/data")
    with store.faults(delay=1.0, where="shard"):
        process = start(store)
        while len(downloads(store)) < before + 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    there = {name for name in contents(local) if not name.startswith(".")}
    assert there < {*FILES}
    output, errors = start(store).communicate()
    assert output == f"{local}\n", errors
    assert f"Copying {len(FILES) - len(there)} files" in errors
    assert {n: c for n, c in contents(local).items() if not n.startswith(".")} == FILES
