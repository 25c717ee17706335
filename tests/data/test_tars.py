"""Tar files: braces, the index, and members that are hostile or damaged."""

import os
import pickle
import tarfile
from pathlib import Path

import pytest

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError
from lit_jax.data.image import decode
from lit_jax.data.listing import expand
from lit_jax.data.sources import open_source, tar_index
from lit_jax.data.sources.index_cache import TableCache
from lit_jax.data.sources.tar_index import open_index
from lit_jax.errors import UserError
from tests.data.formats import CAPTIONS, N, add, write_tars


def open_tars(folder: Path, **config):
    return open_source(SourceConfig(path=str(folder), **config))


def test_braces_are_expanded():
    assert expand("s/{00009..00011}.tar") == ["s/00009.tar", "s/00010.tar", "s/00011.tar"]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand("plain.tar") == ["plain.tar"]


def test_braces_name_tar_files(data):
    assert len(open_tars(data / "tars/{00000..00001}.tar")) == N
    assert len(open_tars(data / "tars/{00001,00000}.tar")) == N
    assert len(open_tars(data / "tars/00000.tar")) == 4
    with pytest.raises(UserError, match=r"00002\.tar"):
        open_tars(data / "tars/{00000..00002}.tar")


def test_the_index_is_made_once_and_again_when_a_file_changes(tmp_path, images, monkeypatch):
    write_tars(tmp_path, images)
    scanned, scan = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda n, file: scanned.append(n) or scan(n, file))
    assert len(open_tars(tmp_path)) == len(open_tars(tmp_path)) == N
    assert sorted(scanned) == [0, 1]
    with tarfile.open(tmp_path / "00001.tar", "a") as tar:
        add(tar, "new.png", images[0])
        add(tar, "new.txt", b"new")
    assert open_tars(tmp_path)[N]["captions"] == ("new",)
    (index,) = tmp_path.glob("lit_jax-index-*.arrow")
    index.write_bytes(index.read_bytes()[:100])  # a damaged index is no harm
    assert len(open_tars(tmp_path)) == N + 1


def test_the_index_goes_to_the_cache_where_nothing_can_be_written(tmp_path, images, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    write_tars(folder, images)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    files = [folder / f"{n:05}.tar" for n in range(2)]
    beside, _ = TableCache(files, [tar_index.VERSION], kind="index").places
    beside.mkdir()  # root may write everywhere, but not a file where a folder is
    assert len(open_index(files)) == N
    assert len(list((cache / "lit_jax").glob("*.arrow"))) == 1
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(files[0]))
    with pytest.raises(UserError, match=r"XDG_CACHE_HOME"):
        open_index(files)


@pytest.mark.parametrize("name", ["../../etc/passwd.png", "/etc/passwd.png", "a/../b.png", "link"])
def test_hostile_members_are_bad_samples(tmp_path, images, name):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        if name == "link":
            add(tar, "x.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        else:
            add(tar, name, images[0])
        add(tar, "good.png", images[1])
        add(tar, "good.txt", b"good")
    source = open_tars(tmp_path)
    with pytest.raises(BadSampleError, match="link") as raised:
        source[0]
    assert raised.value.kind == "hostile_path"
    assert source[1]["captions"] == ("good",)


def test_bad_members_are_bad_samples_of_their_kind(tmp_path, images):
    members = {
        "a.txt": "é".encode("latin-1"),
        "a.png": images[0],
        "b.json": b"{",
        "b.png": images[0],
        "c.json": b"[]",
        "c.png": images[0],
        "d.txt": b"no image",
        "e.png": b"",
        "e.txt": b"e",
        "f.png": images[0][:60],
        "f.txt": b"f",
        "g.png": b"<html>",
        "g.txt": b"g",
    }
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    source, kinds = open_tars(tmp_path), []
    for i in range(len(source)):
        with pytest.raises(BadSampleError) as raised:
            decode(source[i]["image"])
        kinds.append(raised.value.kind)
    assert kinds == [
        "not_utf8",
        "no_example",
        "no_example",
        "missing",
        "empty",
        "damaged",
        "not_image",
    ]


def test_names_that_are_not_utf8_name_images(tmp_path, images):
    with tarfile.open(
        tmp_path / "0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        add(tar, "é.png", images[0])
        add(tar, "é.txt", b"coffee")
    example = open_tars(tmp_path / "0.tar")[0]
    assert (example["key"], example["captions"]) == (r"0.tar/\xe9", ("coffee",))

    folder = os.fsencode(tmp_path / "classes") + b"/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(images[0])
    source = open_source(SourceConfig(path=str(tmp_path / "classes")))
    example = pickle.loads(pickle.dumps(source))[0]
    assert (example["key"], example["label"]) == (r"caf\xe9/\xff.png", r"caf\xe9")
    assert decode(example["image"]).size == (7, 4)


def test_a_truncated_tar_gives_what_is_left_of_it(tmp_path, images, caplog):
    write_tars(tmp_path, images)
    file = tmp_path / "00001.tar"
    with tarfile.open(file) as tar:
        cut = tar.getmember("000000005.jpg").offset_data + 10
    file.write_bytes(file.read_bytes()[:cut])
    source = open_tars(tmp_path)
    assert source[4]["captions"] == (CAPTIONS[4],)
    assert "00001.tar breaks off after" in caplog.text
    for i in range(5, len(source)):
        with pytest.raises(BadSampleError, match=r"000000005 .* end"):
            source[i]


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_an_unreadable_tar_is_refused(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar"):
        open_tars(tmp_path)
