"""Addresses of folders in a bucket: what is refused, and who reads and writes there."""

import importlib.util
import subprocess
import sys

import pytest
from etils import epath

from lit_jax import train
from lit_jax.buckets import BucketPath
from lit_jax.errors import BAD_INPUT, UserError
from lit_jax.files import output_path


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


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_a_client_that_is_not_installed_is_named_with_its_extra(
    monkeypatch, capsys, scheme, package, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != package and find(name))
    address = f"{scheme}://bucket/run"
    assert train.main(["--config=configs/vit_bert.py", f"--workdir={address}"]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert address in errors
    assert package in errors
    assert f"'lit_jax[{extra}]'" in errors
    assert errors.count("\n") == 1


def test_tensorflow_gets_no_address_even_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('imported')\n")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import lit_jax.buckets
from etils import epath
from etils.epath.backend import fsspec_backend
assert epath.Path("gs://bucket/run")._backend is fsspec_backend
"""
    subprocess.run([sys.executable, "-c", program], check=True)
