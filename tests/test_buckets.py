"""Addresses of folders in a bucket: what is refused, and who reads and writes there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from lit_jax import train
from lit_jax.buckets import BucketPath, bucket_path
from lit_jax.credentials import take_keys
from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.files import output_path
from tests.object_store.served import serve


def test_an_address_keeps_its_scheme_and_a_path_on_this_machine_its_type(tmp_path):
    path = output_path("--workdir", "gs://bucket/run")
    assert type(path) is BucketPath
    assert str((path / "checkpoints" / "4").resolve()) == "gs://bucket/run/checkpoints/4"
    assert str(path.absolute().parent / path.name) == "gs://bucket/run"
    assert type(output_path("--workdir", str(tmp_path))) is type(tmp_path)
    # Orbax and JAX make their paths from texts.
    assert type(epath.Path("s3://bucket/run")) is BucketPath


@pytest.mark.parametrize(
    "value",
    [
        "gs://",
        "gs://bucket",
        "gs://bucket/",
        "s3://key:secret@bucket/run",
        "gs://b/../run",
        "gs://b/x#1",
    ],
)
def test_an_address_without_a_folder_in_a_bucket_is_refused(value):
    with pytest.raises(UserError, match=r"--workdir=.*://BUCKET/PATH") as raised:
        output_path("--workdir", value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_client_that_is_not_installed_is_named(monkeypatch, capsys, scheme, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != package and find(name))
    address = f"{scheme}://bucket/run"
    assert train.main(["--config=configs/vit_bert.py", f"--workdir={address}"]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert address in errors
    assert f"pip install {package}" in errors
    assert errors.count("\n") == 1


def test_tensorflow_gets_no_address_even_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('imported')\n")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import lit_jax.buckets
from etils import epath
from etils.epath.backend import fsspec_backend
# epath looks for TensorFlow at the first use of a path.
epath.Path("/").exists()
assert epath.Path("gs://bucket/run")._backend is fsspec_backend
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served") / "bucket") as served:
        served.folder.mkdir()
        yield served


def run(program, *words, env):
    """Run a program in a process of its own, because clients keep the address of their first server."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CHECK = """
import sys
from lit_jax.buckets import check_access
from lit_jax.errors import UserError
from lit_jax.files import output_path
for address in sys.argv[1:]:
    try:
        check_access(output_path("--workdir", address))
        print("ok")
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_is_written_read_and_cleared_before_it_is_used(store, scheme):
    addresses = [f"{scheme}://{name}/run" for name in ("bucket", "readonly", "elsewhere")]
    good, readonly, missing = run(CHECK, *addresses, env=store.environment)
    assert good == "ok"
    assert readonly.startswith(addresses[1])
    assert {"gs": "gcloud auth", "s3": "AWS_ACCESS_KEY_ID"}[scheme] in readonly
    assert missing.startswith(addresses[2])
    assert "no bucket elsewhere" in missing
    assert list(store.folder.iterdir()) == []


def test_a_second_client_without_credentials_is_found_before_it_is_needed(store):
    # TensorStore alone uploads by this kind of request.
    with store.faults(is_expired=True, where="uploadType=media"):
        (found,) = run(CHECK, "gs://bucket/run", env=store.environment)
    assert "TensorStore cannot write" in found


def test_a_clock_that_the_store_refuses_is_not_a_matter_of_credentials(store):
    with store.faults(errors=1.0, status=403, reason="RequestTimeTooSkewed"):
        (found,) = run(CHECK, "s3://bucket/run", env=store.environment)
    assert "RequestTimeTooSkewed" in found
    assert "clock" in found
    assert "AWS_" not in found


USE = r"""
import sys
from pathlib import Path
from lit_jax.bucket_copies import GrowingFiles, temporary_copy, written_locally
from lit_jax.buckets import remove_folder, subfolders
from lit_jax.files import atomic_write, output_path, write_json

folder = output_path("--output", sys.argv[1])
assert not folder.exists()
assert subfolders(folder) == []
remove_folder(folder)
write_json(folder / "a" / "config.json", {"x": 1})
atomic_write(folder / "text", "first")
assert (folder / "text").read_text() == "first"
atomic_write(folder / "text", "second")
assert (folder / "text").read_bytes() == b"second"
assert [found.name for found in subfolders(folder)] == ["a"]
assert (folder / "a").is_dir() and not (folder / "text").is_dir() and folder.exists()
with written_locally(folder / "b") as local:
    (local / "c").mkdir()
    (local / "c" / "d.txt").write_text("deep")
with written_locally(folder / "b") as local:
    for name in ("z.txt", "config.json", "A.txt"):
        (local / name).write_text(name)
copy = temporary_copy(folder)
assert sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()) == [
    "a/config.json", "b/A.txt", "b/c/d.txt", "b/config.json", "b/z.txt", "text"
]
assert sorted(p.parent.name for p in folder.glob("*/config.json")) == ["a", "b"]
growing = GrowingFiles(folder / "g")
with (growing.folder / "rows").open("a", buffering=1) as rows:
    rows.write("1\n")
    growing.copy()
    assert (folder / "g" / "rows").read_text() == "1\n"
    rows.write("2\n")
    growing.copy_if_due()
    assert (folder / "g" / "rows").read_text() == "1\n"
    growing.close()
assert (folder / "g" / "rows").read_text() == "1\n2\n"
assert not growing.folder.exists()
# A file that grows while it is copied arrives with the bytes that it had.
import lit_jax.bucket_copies as copies
growing = GrowingFiles(folder / "h")
(growing.folder / "rows").write_text("1\n2\n")
copies._upload(growing.folder, folder / "h", {growing.folder / "rows": 2})
assert (folder / "h" / "rows").read_text() == "1\n"
growing.close()
assert (folder / "h" / "rows").read_text() == "1\n2\n"
try:
    (folder / "none").read_bytes()
except FileNotFoundError as error:
    assert error.filename == str(folder / "none")
remove_folder(folder / "a")
assert not (folder / "a").exists() and (folder / "b").exists()
"""


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_folder_in_a_bucket_is_used_like_one_on_a_disk(store, scheme):
    run(USE, f"{scheme}://bucket/{scheme}/run", env=store.environment)
    assert (store.folder / scheme / "run" / "g" / "rows").read_text() == "1\n2\n"
    assert (store.folder / scheme / "run" / "b" / "c" / "d.txt").read_text() == "deep"
    written = [Path(name) for entry in store.log() for name in entry["written"]]
    # A reader takes a folder for a model as soon as its config is there.
    assert [path.name for path in written if path.parent.name == "b"][-1] == "config.json"


def test_a_small_file_is_one_request(store):
    before = len(store.log())
    program = (
        "import sys; from lit_jax.files import *; atomic_write(output_path('x', sys.argv[1]), 'x')"
    )
    run(program, "gs://bucket/one", env=store.environment)
    assert [entry["written"] for entry in store.log()[before:]] == [["one"]]


CACHE = """
import sys
import numpy as np
from lit_jax.evals.cache import EmbeddingCache
from lit_jax.files import output_path

folder = output_path("--cache", sys.argv[1])
computed = []
def compute():
    computed.append(1)
    return np.arange(6.0).reshape(2, 3), np.array([4, 7])
def get():
    return EmbeddingCache(folder).once("key", lambda: "name", compute, lambda found: found)
first, second = get(), get()
assert len(computed) == 1
for ours, theirs in zip(first, second, strict=True):
    np.testing.assert_array_equal(ours, theirs)
(folder / "name.npz").write_bytes((folder / "name.npz").read_bytes()[:-5])
get(), get()
assert len(computed) == 2
"""


def test_embeddings_of_evaluations_are_kept_in_a_bucket(store):
    run(CACHE, "gs://bucket/cache", env=store.environment)
    assert (store.folder / "cache" / "name.npz").exists()


WEIGHTS = """
import sys
from lit_jax.errors import UserError
from lit_jax.weights.hub import local_folder

for address in sys.argv[1:]:
    try:
        print(local_folder(address, config_key="config.model.image.model"))
    except UserError as error:
        print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_the_needed_files_of_a_model_are_copied_from_a_bucket(store, tmp_path, scheme):
    content = {
        "config.json": b"{}",
        "model.safetensors": b"12345",
        "pytorch_model.bin": b"the same in another format",
        "onnx/model.onnx": b"and in another",
    }
    folder = store.folder / f"{scheme}-vit"
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    environment = store.environment | {"XDG_CACHE_HOME": str(tmp_path)}
    names = f"bucket/{folder.name}", "bucket/none", "elsewhere/vit"
    found, *errors = run(WEIGHTS, *(f"{scheme}://{name}" for name in names), env=environment)
    copied = Path(found)
    assert copied.parent == tmp_path / "lit_jax" / "copies" / scheme / names[0]
    assert {file.name for file in copied.iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    assert (copied / "model.safetensors").read_bytes() == b"12345"
    for name, error in zip(names[1:], errors, strict=True):
        assert error.startswith("config.model.image.model")
        assert f"{scheme}://{name}" in error
    # The model is saved again, in shards: the file that has left the bucket must not be read.
    (folder / "model.safetensors").unlink()
    index, shard = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    for name in (index, shard):
        (folder / name).write_bytes(b"new")
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_bytes(b"of another model")
    (store.folder / f"{scheme}-file").write_bytes(b"x")
    (store.folder / f"{scheme}-above" / "vit").mkdir(parents=True)
    (store.folder / f"{scheme}-above" / "vit" / "config.json").write_bytes(b"{}")
    others = [f"{scheme}://bucket/{scheme}-{name}" for name in ("file", "above")]
    newer, *errors = run(WEIGHTS, f"{scheme}://{names[0]}", *others, env=environment)
    assert {file.name for file in Path(newer).iterdir()} == {"config.json", index, shard}
    for address, error in zip(others, errors, strict=True):
        assert address in error
        assert "give the folder" in error


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    "rest",
    ["bucket/vit?endpoint_override=h", "bucket/vit?secret_key=SECRET", "KEY:SECRET@bucket/vit"],
)
def test_an_address_with_options_or_keys_is_refused_without_showing_them(scheme, rest):
    with pytest.raises(UserError) as raised:
        bucket_path("config.model.image.model", f"{scheme}://{rest}")
    assert "config.model.image.model=" in str(raised.value)
    assert "AWS_ACCESS_KEY_ID" in str(raised.value) or "GOOGLE_APPLICATION" in str(raised.value)
    assert "SECRET" not in str(raised.value).replace("AWS_SECRET", "")
    assert ("question mark" in str(raised.value)) == ("?" in rest)


def test_keys_that_the_start_of_a_command_has_taken_from_an_address_are_not_forgotten(monkeypatch):
    monkeypatch.setenv("LIT_JAX_ADDRESS_KEYS", "{}")
    address = take_keys("s3://KEY:SECRET@bucket/vit")
    with pytest.raises(UserError) as raised:
        bucket_path("config.model.text.model", address)
    assert "config.model.text.model=s3://bucket/vit" in str(raised.value)
    assert "AWS_ACCESS_KEY_ID" in str(raised.value)
    # Another model may lie in a bucket whose data came with keys.
    assert str(bucket_path("config.model.text.model", "s3://bucket/bert")) == "s3://bucket/bert"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_address_is_refused_that_leaves_no_room_for_the_names_below_it(scheme):
    folder = "é" * 390
    assert str(bucket_path("--workdir", f"{scheme}://bucket/{folder}/run")).endswith("/run")
    with pytest.raises(UserError, match=rf"--workdir={scheme}://bucket/.* 1024 "):
        bucket_path("--workdir", f"{scheme}://bucket/{folder}/{'x' * 20}/run")
