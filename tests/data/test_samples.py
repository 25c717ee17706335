"""Samples made of several files: in tars as WebDataset, img2dataset and CLIP_benchmark write them."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data import files
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source, tars
from lit_jax.errors import UserError


def write_tar(path: Path, members: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def open_at(path: Path, **config) -> Source:
    return open_source(SourceConfig(path=str(path), **config))


def describe(source: Source) -> dict[str, tuple[str, ...] | str]:
    """Captions by key, or the kind of a bad sample by its number."""
    found = {}
    for i in range(len(source)):
        try:
            example = source[i]
            decode(example["image"])
            found[example["key"].split("/", 1)[1]] = example["captions"]
        except BadSampleError as error:
            found[str(i)] = error.kind
    return found


def test_each_line_of_a_text_is_a_caption(tmp_path, image):
    """As CLIP_benchmark reads it; not where json holds the caption as well, as img2dataset writes it."""
    caption = "first\nsecond"
    members = {
        "a.jpg": image,
        "a.txt": "one\r\ntwo\n\nthree\n",
        "b.jpg": image,
        "b.txt": caption,
        "b.json": json.dumps({"caption": caption, "key": 7}),
        "c.jpg": image,
        "c.txt": caption,
        "c.json": json.dumps({"url": "http://a.org"}),
        "d.jpg": image,
        "d.txt": "\ufeffone",
    }
    write_tar(tmp_path / "0.tar", members)
    assert describe(open_at(tmp_path)) == {
        "a": ("one", "two", "three"),
        "b": (caption,),
        "c": ("first", "second"),
        "d": ("one",),
    }


@pytest.mark.parametrize("suffix", ["webp", "png", "jpg"])
def test_clip_benchmark_keeps_splits_in_folders(tmp_path, image, suffix):
    """Its builder writes s0000000.webp and .cls into test/0.tar, and text files beside and above them."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        samples = {
            f"s{n:07}.{e}": v for n in range(2) for e, v in ((suffix, image), ("cls", f"{n}"))
        }
        write_tar(tmp_path / split / "0.tar", samples)
        write_tar(tmp_path / split / "1.tar", samples if split == "train" else {})
        (tmp_path / split / "nshards.txt").write_text("2\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    source = open_at(tmp_path, split="test")
    assert [source[i]["label"] for i in range(len(source))] == ["0", "1"]
    assert len(open_at(tmp_path, split="train")) == 4
    for split in (None, "val"):
        with pytest.raises(UserError, match=r"test, train"):
            open_at(tmp_path, split=split)


DOTS = {
    # name: (members, captions by key or kinds by number, words of the log)
    "the first dot ends a key": (
        ["a.jpg", "a.txt", "holiday.2019.jpg", "holiday.2019.txt", "s.left.png", "s.txt"],
        {"a": ("a.txt",), "holiday": ("holiday.2019.txt",), "s": ("s.txt",)},
        [],
    ),
    "two images, which the last dot tells apart": (
        ["s0.input.jpg", "s0.target.jpg", "s1.input.jpg", "s1.target.jpg"],
        {"s0.input": (), "s0.target": (), "s1.input": (), "s1.target": ()},
        [],
    ),
    "pairs, which the last dot tells apart": (
        ["photo.v1.jpg", "photo.v1.txt", "photo.v2.jpg", "photo.v2.txt"],
        {"photo.v1": ("photo.v1.txt",), "photo.v2": ("photo.v2.txt",)},
        [],
    ),
    "a second version with a caption of its own": (
        ["photo.jpg", "photo.txt", "photo.v2.jpg", "photo.v2.txt", "lost.txt"],
        {"photo": ("photo.txt",), "photo.v2": ("photo.v2.txt",), "2": "missing"},
        ["1 (for example 0.tar/lost)"],
    ),
    "a mask beside a plain image": (
        ["x.jpg", "x.mask.png", "x.txt", "y.jpg", "y.mask.png", "y.txt"],
        {"x": ("x.txt",), "y": ("y.txt",)},
        ["2 .png (for example 0.tar/x.mask.png, 0.tar/y.mask.png)"],
    ),
    "two images of one caption are ambiguous": (
        ["a.jpg", "a.txt", "s.left.jpg", "s.right.jpg", "s.txt"],
        {"a": ("a.txt",), "1": "no_example"},
        ["several images", "1 (for example 0.tar/s)"],
    ),
    "two files of captions are all read": (
        ["a.jpg", "a.de.txt", "a.en.txt"],
        {"a": ("a.de.txt", "a.en.txt")},
        ["1 (for example 0.tar/a)"],
    ),
    "captions of other endings": (
        [
            "a.jpg",
            "a.caption",
            "b.JPG",
            "b.Text",
            "c.jpg",
            "c.caption",
            "c.txt",
            "d.jpg",
            "d.text.txt",
        ],
        {"a": ("a.caption",), "b": ("b.Text",), "c": ("c.txt",), "d": ("d.text.txt",)},
        ["1 .caption (for example 0.tar/c.caption)"],
    ),
    "images of other endings": (
        ["a.jfif", "a.txt", "b.avif", "c.ppm", "d.PGM", "dir.x/e.jp2"],
        {"a": ("a.txt",), "b": (), "c": (), "d": (), "dir.x/e": ()},
        [],
    ),
    "unknown kinds are counted": (
        [
            "a.jpg",
            "a.npy",
            "b.jpg",
            "b.npy",
            "b.flac",
            "._a.jpg",
            ".nb/x.jpg",
            "README",
            "c.jpg.bak",
            "e.cls",
        ],
        {"a": (), "b": (), "2": "missing"},
        [
            "2 .npy (for example 0.tar/a.npy, 0.tar/b.npy)",
            "2 hidden (for example 0.tar/._a.jpg",
            "1 without an ending (for example 0.tar/README)",
            "1 .bak",
            "1 .flac",
        ],
    ),
}


@pytest.mark.parametrize("name", DOTS)
def test_names_with_several_dots(tmp_path, image, caplog, name):
    """Also of the data set that is opened again, whose index is there."""
    names, expected, said = DOTS[name]
    text = (".txt", ".text", ".caption", ".cls")
    write_tar(
        tmp_path / "0.tar",
        {name: name if name.lower().endswith(text) else image for name in names},
    )
    for _ in range(2):
        caplog.clear()
        assert describe(open_at(tmp_path)) == expected
        assert bool(caplog.text) == bool(said)
        for words in said:
            assert words in caplog.text


def test_one_reading_holds_for_all_files_of_a_source(tmp_path, image):
    write_tar(tmp_path / "0.tar", {"photo.v1.jpg": image, "photo.v1.txt": "one"})
    assert [*describe(open_at(tmp_path / "0.tar"))] == ["photo"]
    write_tar(tmp_path / "1.tar", {"p.v1.jpg": image, "p.v2.jpg": image})
    assert [*describe(open_at(tmp_path))] == ["photo.v1", "p.v1", "p.v2"]


def test_json_that_nobody_needs_does_not_spoil_a_sample(tmp_path, image):
    members = {
        "a.jpg": image,
        "a.txt": "a",
        "a.json": "{",
        "b.jpg": image,
        "b.cls": "3",
        "b.json": "[" * 100_000,
        "c.jpg": image,
        "c.txt": "c",
        "c.json": '{"key": 5, "caption": "c", "title": "C"}',
        "d.jpg": image,
        "d.json": "[]",
    }
    write_tar(tmp_path / "0.tar", members)
    source = open_at(tmp_path)
    assert describe(source) == {"a": ("a",), "b": (), "c": ("c",), "3": "no_example"}
    assert source[1]["label"] == "3"
    wanted = open_at(tmp_path, caption_key="title")
    with pytest.raises(BadSampleError):
        wanted[0]


def test_texts_alone_need_no_image(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", {"a.txt": "one\ntwo"})
    example = open_source(SourceConfig(path=str(tmp_path)), text_only=True)[0]
    assert (example["image"], example["captions"]) == (None, ("one", "two"))
    assert not caplog.text
    open_at(tmp_path)
    assert caplog.text


def test_a_video_between_an_image_and_its_text_is_not_read(tmp_path, image, monkeypatch):
    video = bytes(1 << 20)
    write_tar(tmp_path / "0.tar", {"a.jpg": image, "a.mp4": video, "a.txt": "a", "b.txt": "b"})
    source, sizes = open_at(tmp_path), []

    def counted(file, start, stop):
        sizes.append(stop - start)
        return files.read(file, start, stop)

    monkeypatch.setattr(tars, "read", counted)
    assert source[0]["captions"] == ("a",)
    assert sum(sizes) == len(image) + 1


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TGZ", "1.tar.zst"])
def test_compressed_tars_beside_others_are_told(tmp_path, image, caplog, name):
    write_tar(tmp_path / "0.tar", {"a.png": image, "a.txt": "a"})
    (tmp_path / name).write_bytes(b"")
    assert len(open_at(tmp_path)) == 1
    assert re.search(rf" 1 .*{re.escape(name)}", caplog.text)


def test_compressed_tars_of_another_split_or_that_are_unpacked_are_not_told(
    tmp_path, image, caplog
):
    write_tar(tmp_path / "train-0.tar", {"a.png": image, "a.txt": "a"})
    for name in ("train-0.tar.gz", "test-0.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    assert len(open_at(tmp_path, split="train")) == 1
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(b"a", mtime=0), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "lfs pull"),
    ],
)
@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_the_cause_is_named_for_every_file_of_a_data_set(tmp_path, image, ending, content, told):
    write_tar(tmp_path / "0.tar", {"a.png": image, "a.txt": "a"})
    parquet.write_table(pa.table({"image": ["a"], "caption": ["a"]}), tmp_path / "0.parquet")
    (tmp_path / f"1.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=rf"1\.{ending}.*{told}"):
        open_source(SourceConfig(path=f"{tmp_path}/{{0..1}}.{ending}"))


def test_a_text_in_another_encoding_is_named(tmp_path, image):
    (tmp_path / "a.png").write_bytes(image)
    (tmp_path / "a.txt").write_text("é", encoding="utf-16")
    with pytest.raises(BadSampleError, match="UTF-16") as raised:
        open_at(tmp_path)[0]
    assert raised.value.kind == "not_utf8"


def test_the_logs_of_img2dataset_beside_its_tars_are_not_told(tmp_path, image, caplog):
    write_tar(tmp_path / "00000.tar", {"a.png": image, "a.txt": "a"})
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"")
    assert len(open_at(tmp_path)) == 1
    assert not caplog.text


def test_the_files_of_a_sample_may_stand_apart(tmp_path, image, caplog):
    """A plain `tar` packs the files of a folder in no order."""
    write_tar(
        tmp_path / "0.tar",
        {"b.txt": "b", "a.png": image, "c.txt": "c", "a.txt": "a", "b.png": image, "c.png": image},
    )
    assert describe(open_at(tmp_path)) == {"b": ("b",), "a": ("a",), "c": ("c",)}
    assert not caplog.text


def test_neighbours_are_a_sample_where_an_ending_repeats(tmp_path, image):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt"):
            content = image if name.endswith("png") else name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_at(tmp_path)
    assert [source[i]["captions"] for i in range(len(source))] == [
        ("a.txt",),
        ("b.txt",),
        ("a.txt",),
    ]
