"""Embeddings of another tower, config or data are refused, and folders that cannot be written."""

import re
import uuid

import jax
import numpy as np
import pytest

from lit_jax import embed as command
from lit_jax.cli import BAD_INPUT
from lit_jax.embed import embed
from lit_jax.errors import UserError
from lit_jax.precomputed import format as data_embeddings
from lit_jax.precomputed import tower
from lit_jax.precomputed.format import MANIFEST
from tests.training.embedded_pairs import SHARD, content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views=0"], "--views=0"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--side=text", "--views=2"], "--views .*--side=text"),
        (["--config.data.image_embedding=x"], "'image_embeddings'"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(tmp_path, capsys, flags, message):
    output = tmp_path / "cache"
    code = command.main(["--config=configs/vit_bert.py", f"--output={output}", *flags])
    assert code == BAD_INPUT
    errors = capsys.readouterr().err
    assert re.search(message, errors)
    assert len(errors.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "side", "message"),
    [
        ({"data.views": 2}, "image", "config.data.views=2"),
        ({"data.flip": True}, "image", r"--views=K"),
        ({}, "text", "locked text tower"),
        ({"policy.lock": "UU"}, "image", "config.policy.lock"),
    ],
)
def test_a_config_that_cannot_be_embedded_is_refused(make, tmp_path, changes, side, message):
    with pytest.raises(UserError, match=message):
        embed(make(**changes), tmp_path / "cache", side)
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, make):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{tmp_path} .*--output"):
        embed(make(), tmp_path, "image")
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_a_damaged_note_of_what_was_started_is_named(make, tmp_path):
    """The shards alone do not say of what they are."""
    output = tmp_path / "cache"
    embed(make(), output, "image", batch_size=8)
    (output / "started.json").write_text('{"side": "ima')
    whole = content(output)
    with pytest.raises(UserError, match=r"started.json"):
        embed(make(), output, "image", batch_size=8)
    assert content(output) == whole


ONE_NAME = uuid.UUID(int=0)


@pytest.mark.parametrize(
    "in_the_way", [MANIFEST, f".{SHARD}.{ONE_NAME.hex}.new"], ids=["manifest", "shard"]
)
def test_a_folder_that_cannot_be_written_is_named(make, tmp_path, monkeypatch, in_the_way):
    """By another folder where a file should be; rights would not stop root."""
    monkeypatch.setattr(uuid, "uuid4", lambda: ONE_NAME)
    output = tmp_path / "cache"
    embed(make(), output, "image", batch_size=8)
    whole = content(output)
    for name in (MANIFEST, SHARD):
        (output / name).unlink()
    (output / in_the_way).mkdir()
    with pytest.raises(UserError) as raised:
        embed(make(), output, "image", batch_size=8)
    assert str(raised.value).startswith(f"{output} cannot be written (")
    assert not (output / MANIFEST).is_file()
    (output / in_the_way).rmdir()
    embed(make(), output, "image", batch_size=8)
    assert content(output) == whole


def test_two_writers_of_one_shard_leave_one_whole(tmp_path):
    """Of two commands, on two machines, perhaps of the same process number."""
    with data_embeddings.ShardWriter(tmp_path / SHARD) as first:
        first.add(np.ones((1, 4), np.float16))
        with data_embeddings.ShardWriter(tmp_path / SHARD) as second:
            second.add(np.ones((1, 4), np.float16))
        whole = (tmp_path / SHARD).read_bytes()
    assert content(tmp_path).keys() == {SHARD, f".{SHARD}.json"}
    assert (tmp_path / SHARD).read_bytes() == whole


def test_too_little_memory_on_the_device_is_not_the_folders_fault(make, tmp_path, monkeypatch):
    def pool(*_):
        return jax.numpy.zeros(1 << 46, np.uint8).block_until_ready()  # 64 TiB

    output = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(tower, "_outputs", pool)
        with pytest.raises(UserError, match=r"8 .*--batch_size"):
            embed(make(), output, "image", batch_size=8)
    assert content(output).keys() == {"started.json"}
    monkeypatch.setattr(tower, "_outputs", lambda *_: jax.numpy.zeros(3) + np.zeros(4))
    with pytest.raises(TypeError, match="shapes"):  # other mistakes stay what they are
        embed(make(), output, "image", batch_size=8)
