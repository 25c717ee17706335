"""The clients of buckets read and write the emulated bucket, and notice its faults."""

import http.client
import json
import os
import subprocess
import sys

import fsspec
import pyarrow.fs
import pytest
import tensorstore

from tests.object_store.served import BUCKET, READONLY, serve

OPTIONS = {"gs": {"token": "anon"}, "s3": {}}
# The smallest part of an upload in parts.
PART = {"gs": 2**18, "s3": 5 * 2**20}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served") / "bucket") as served:
        served.folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in served.environment.items():
                patch.setenv(name, value)
            yield served


def opened(scheme):
    # The kept instances point to the bucket of another test.
    return fsspec.filesystem(scheme, skip_instance_cache=True, **OPTIONS[scheme])


def key_values(store, scheme):
    driver = {"driver": "gcs"}
    if scheme == "s3":
        driver = {"driver": "s3", "endpoint": store.url, "aws_region": "us-east-1"}
    place = {"bucket": BUCKET, "path": f"tensorstore-{scheme}/"}
    retries = {"max_retries": 20, "initial_delay": "1ms", "max_delay": "10ms"}
    context = tensorstore.Context({f"{driver['driver']}_request_retries": retries})
    return tensorstore.KvStore.open(driver | place, context=context).result()


def ask(store, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.mark.parametrize("scheme", OPTIONS)
def test_fsspec_writes_reads_lists_moves_and_deletes(store, scheme):
    files, home = opened(scheme), f"{BUCKET}/fsspec-{scheme}"
    files.pipe_file(f"{home}/a", b"hello")
    with files.open(f"{home}/folder/large", "wb", block_size=PART[scheme]) as stream:
        for part in range(4):
            stream.write(bytes([part]) * PART[scheme])
    local = store.folder / f"fsspec-{scheme}"
    assert (local / "a").read_bytes() == b"hello"
    assert (local / "folder" / "large").read_bytes()[:: PART[scheme]] == b"\0\1\2\3"
    assert files.cat_file(f"{home}/a", start=1, end=3) == b"el"
    files.cp_file(f"{home}/a", f"{home}/b")
    files.mv(f"{home}/b", f"{home}/c")
    assert files.ls(home, detail=False) == [f"{home}/a", f"{home}/c", f"{home}/folder"]
    with store.faults(page=1):
        found = opened(scheme).find(home, withdirs=False)
    assert found == [f"{home}/a", f"{home}/c", f"{home}/folder/large"]
    files.rm(home, recursive=True)
    assert not local.exists()
    assert not files.exists(home)


@pytest.mark.parametrize("scheme", OPTIONS)
def test_fsspec_creates_an_object_only_once(store, scheme):
    files, name = opened(scheme), f"{BUCKET}/once-{scheme}"
    files.pipe_file(name, b"first", mode="create")
    with pytest.raises(OSError, match=r"PreconditionFailed|upload"):
        files.pipe_file(name, b"second", mode="create")
    with pytest.raises(OSError, match=r"PreconditionFailed|upload"):
        files.pipe_file(name, b"x" * (PART[scheme] + 1), mode="create", chunksize=PART[scheme])
    assert (store.folder / f"once-{scheme}").read_bytes() == b"first"


@pytest.mark.parametrize("scheme", OPTIONS)
def test_missing_and_read_only_buckets_are_errors(store, scheme):
    files = opened(scheme)
    with pytest.raises(FileNotFoundError):
        files.pipe_file("elsewhere/a", b"hello")
    with pytest.raises(FileNotFoundError):
        files.ls("elsewhere/folder")
    with pytest.raises(OSError, match=r"Forbidden|AccessDenied"):
        files.pipe_file(f"{READONLY}/a", b"hello")
    assert not (store.folder / "a").exists()


@pytest.mark.parametrize("scheme", OPTIONS)
def test_tensorstore_writes_only_over_the_generation_that_it_knows(store, scheme):
    values = key_values(store, scheme)
    nothing = values.read("a").result().stamp.generation
    first = values.write("a", b"1", if_equal=nothing).result().generation
    assert first
    assert not values.write("a", b"2", if_equal=nothing).result().generation
    second = values.write("a", b"2", if_equal=first).result().generation
    assert second
    assert not values.write("a", b"3", if_equal=first).result().generation
    values.write("a", None, if_equal=first).result()
    assert values.read("a").result().value == b"2"
    values.write("a", None, if_equal=second).result()
    assert values.list().result() == []


@pytest.mark.parametrize("scheme", OPTIONS)
def test_tensorstore_repeats_what_fails_for_a_moment(store, scheme):
    values = key_values(store, scheme)
    with store.faults(errors=0.4, delay=0.01, seed=1, where=f"tensorstore-{scheme}"):
        for number in range(4):
            values.write(f"a/{number}", b"x" * number).result()
        assert [len(values[f"a/{number}"]) for number in range(4)] == [0, 1, 2, 3]
    assert 503 in {entry["status"] for entry in store.log()}


@pytest.mark.parametrize("address", ["gs://anonymous", "s3://test:test"])
def test_arrow_writes_reads_and_lists(store, address):
    home = f"{address}@{BUCKET}/arrow-{address[:2]}"
    files, path = pyarrow.fs.FileSystem.from_uri(store(home))
    size = 6 * 2**20
    with files.open_output_stream(f"{path}/a") as stream:
        for part in range(3):
            stream.write(bytes([part]) * size)
    with files.open_input_file(f"{path}/a") as stream:
        assert stream.read()[::size] == b"\0\1\2"
    files.copy_file(f"{path}/a", f"{path}/b")
    with store.faults(page=1):
        found = files.get_file_info(pyarrow.fs.FileSelector(path))
    assert [info.base_name for info in found] == ["a", "b"]
    files.delete_file(f"{path}/a")
    folder = store.folder / path.partition("/")[2]
    assert not (folder / "a").exists()
    assert (folder / "b").stat().st_size == 3 * size


def test_an_upload_that_ends_in_the_middle_leaves_no_object(store):
    google = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=cut"
    with store.faults(cut=1.0):
        for method, path in (("POST", google), ("PUT", f"/{BUCKET}/cut")):
            with pytest.raises(ConnectionError):
                ask(store, method, path, b"x" * 2**20)
    assert ask(store, "GET", f"/{BUCKET}/cut")[0] == 404
    assert ask(store, "PUT", f"/{BUCKET}/cut", b"x")[0] == 200


def test_a_lost_answer_hides_a_write_that_took_place(store):
    with store.faults(lost=1.0, where="lost"):
        status, said = ask(store, "PUT", f"/{BUCKET}/lost", b"x", {"If-None-Match": "*"})
        assert status == 503
        assert b"SlowDown" in said
    status, said = ask(store, "PUT", f"/{BUCKET}/lost", b"x", {"If-None-Match": "*"})
    assert status == 412
    assert b"PreconditionFailed" in said


def test_expired_credentials_are_refused_as_each_store_does(store):
    with store.faults(is_expired=True):
        status, said = ask(store, "GET", f"/storage/v1/b/{BUCKET}/o")
        assert status == 401
        assert json.loads(said)["error"]["message"] == "Invalid Credentials"
        status, said = ask(store, "GET", f"/{BUCKET}/a")
        assert status == 403
        assert b"ExpiredToken" in said
    assert ask(store, "GET", f"/{BUCKET}/?list-type=2")[0] == 200


def test_the_log_names_the_process_of_each_write(store):
    path = f"/{BUCKET}/of"
    code = (
        "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1])); "
        "c.request('PUT', sys.argv[2], b'2'); c.getresponse()"
    )
    assert ask(store, "PUT", path, b"1")[0] == 200
    with subprocess.Popen([sys.executable, "-c", code, str(store.port), path]) as other:
        assert other.wait() == 0
    assert store.writers()["of"] == [os.getpid(), other.pid]
