"""Samples made of several files: in tars as WebDataset, img2dataset and CLIP_benchmark write them."""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import subprocess
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
from tests.object_store.served import BUCKET, serve


@pytest.fixture(scope="session")
def image(noise, encode) -> bytes:
    return encode(noise(4, 7, 3))


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


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_holes_in_a_tar_are_a_bad_sample(tmp_path, image, form):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(image)
    os.truncate(tmp_path / "a.png", 1 << 20)
    (tmp_path / "b.png").write_bytes(image)
    command = ["tar", "cSf", "0.tar", f"--format={form}", "a.png", "a.txt", "b.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert describe(open_at(tmp_path / "0.tar")) == {"0": "damaged", "b": ()}


def patched(name: str, image: bytes, change) -> bytes:
    """A tar of three samples in which the header of one member is another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member_name in ("a.png", "b.png", "c.png"):
            member = tarfile.TarInfo(member_name)
            member.size = len(image)
            start = buffer.tell()
            tar.addfile(member, io.BytesIO(image))
            if member_name == name:
                header = bytearray(buffer.getvalue()[start : start + 512])
                change(header)
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                buffer.seek(start)
                buffer.write(header)
                buffer.seek(0, 2)
    return buffer.getvalue()


def set_size(size: int):
    def change(header: bytearray) -> None:
        # As GNU tar writes what has no place in 11 octal digits.
        first = 0x80 if size >= 0 else 0xFF
        header[124:136] = bytes([first]) + size.to_bytes(11, "big", signed=True)

    return change


def pax(size: str):
    def change(header: bytearray) -> None:
        header[156:157] = b"x"
        header[124:136] = size.encode() + b"\0"

    return change


LIES = {
    "negative": set_size(-1024),
    "beyond the file": set_size(1 << 40),
    "beyond any file": set_size(1 << 70),
    "a huge pax header": pax("77777777777"),
    "a link": lambda header: header.__setitem__(slice(156, 157), b"2"),
    "a device": lambda header: header.__setitem__(slice(156, 157), b"3"),
    "an old sparse file": lambda header: header.__setitem__(slice(156, 157), b"S"),
    "no number": lambda header: header.__setitem__(slice(124, 136), b"zzzzzzzzzzz\0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_cost_no_more_than_their_tar(tmp_path, image, caplog, lie):
    """Samples before stay; what is lost is said, each time the data set is opened."""
    (tmp_path / "0.tar").write_bytes(patched("b.png", image, LIES[lie]))
    for _ in range(2):
        caplog.clear()
        found = describe(open_at(tmp_path))
        good = [key for key, value in found.items() if value == ()]
        assert good in (["a"], ["a", "c"])
        assert set(found.values()) <= {(), "damaged", "hostile_path"}
        assert len(found) == 3 or "0.tar" in caplog.text


def test_a_tar_whose_first_header_is_damaged_is_refused(tmp_path):
    """A map of holes that is none is a ValueError in tarfile."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        member.size = 600
        tar.addfile(member, io.BytesIO(bytes(600)))
    with pytest.raises(UserError, match=r"0\.tar"):
        open_at(tmp_path)


def test_a_tar_that_goes_on_behind_its_end_is_told(tmp_path, image, caplog):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.part", {f"{name}.png": image})
    parts = [(tmp_path / f"{name}.part").read_bytes() for name in ("a", "b")]
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    assert len(open_at(tmp_path)) == 1
    assert re.search(r"0\.tar .*\b1 .*byte \d+", caplog.text)


# Files, as img2dataset writes them by default.


def write_files(root: Path, image: bytes, shards: int = 2) -> None:
    """Three images a shard, of which one could not be downloaded; only its row in the table is there."""
    schema = pa.schema([(name, pa.string()) for name in ("key", "caption", "status")])
    for shard in range(shards):
        folder, rows = root / f"{shard:05}", []
        folder.mkdir(parents=True)
        for n in range(3):
            key, caption = f"{shard:05}{n:04}", f"caption {n}\nof {shard}"
            status = "failed_to_download" if n == 1 else "success"
            rows.append({"key": key, "caption": caption, "status": status})
            if n != 1:
                (folder / f"{key}.jpg").write_bytes(image)
                (folder / f"{key}.txt").write_text(caption)
                (folder / f"{key}.json").write_text(json.dumps(rows[-1], indent=4))
        parquet.write_table(pa.Table.from_pylist(rows, schema), root / f"{shard:05}.parquet")
        (root / f"{shard:05}_stats.json").write_text('{"count": 3}')


FILES = {
    f"{shard:05}/{shard:05}{n:04}": (f"caption {n}\nof {shard}",)
    for shard in (0, 1)
    for n in (0, 2)
}


def captions_by_key(source: Source) -> dict[str, tuple[str, ...]]:
    examples = [source[i] for i in range(len(source))]
    assert all(decode(example["image"]).size == (7, 4) for example in examples)
    return {example["key"]: example["captions"] for example in examples}


def test_files_of_img2dataset_are_pairs(tmp_path, image, caplog):
    write_files(tmp_path, image)
    source = open_at(tmp_path)
    assert captions_by_key(source) == FILES
    assert captions_by_key(pickle.loads(pickle.dumps(source))) == FILES
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    (tmp_path / "README.md").write_text("")
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    assert captions_by_key(open_at(tmp_path)) == FILES
    inside = captions_by_key(open_at(tmp_path / "00001"))
    assert [*inside.values()] == [FILES[key] for key in FILES if key.startswith("00001")]


def test_files_of_img2dataset_are_read_from_an_object_store(tmp_path, image):
    write_files(tmp_path, image)
    with serve(tmp_path.parent) as address:
        for store in ("s3://nobody:none", "gs://anonymous"):
            path = address(f"{store}@{BUCKET}/{tmp_path.name}")
            assert captions_by_key(open_source(SourceConfig(path=path))) == FILES


def test_pairs_of_files_have_splits_as_other_folders(tmp_path, image):
    for split in ("train", "val"):
        write_files(tmp_path / split, image, shards=1)
    assert len(open_at(tmp_path, split="val")) == 2
    for split in (None, "test"):
        with pytest.raises(UserError, match=r"train, val"):
            open_at(tmp_path, split=split)


def test_pairs_of_files_may_lie_anywhere_and_be_incomplete(tmp_path, image, caplog):
    files = {
        "a.jpg": image,
        "a.txt": b"one\ntwo",
        "a.cls": b"3",
        "b.png": image,
        "b.caption": b"b",
        "deep/er/photo.v1.jfif": image,
        "deep/er/photo.v1.txt": b"v1",
        "deep/er/photo.v2.jfif": image,
        "deep/er/photo.v2.txt": b"v2",
        "deep/lost.txt": b"no image",
        "deep/x.gif": image,
        "deep/caf\udce9.png": image,
        "deep/caf\udce9.txt": b"cafe",
        "notes/readme.txt": b"no caption",
        ".cache/c.jpg": image,
        ".cache/c.txt": b"c",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source, found = open_at(tmp_path), {}
    for i in range(len(source)):
        with contextlib.suppress(BadSampleError):
            found[source[i]["key"]] = source[i]["captions"]
    assert found == {
        "a": ("one", "two"),
        "b": ("b",),
        "deep/er/photo.v1": ("v1",),
        "deep/er/photo.v2": ("v2",),
        "deep/x": (),
        r"deep/caf\xe9": ("cafe",),
    }
    assert len(source) == len(found) + 1
    assert source[0]["label"] == "3"
    assert "deep/lost" in caplog.text
    assert "notes/readme.txt" in caplog.text


def test_folders_of_classes_with_a_text_here_and_there_stay_classes(tmp_path, image, caplog):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for n in range(3):
            (tmp_path / name / f"{n}.jpg").write_bytes(image)
        (tmp_path / name / "0.txt").write_text("credits")
    source = open_at(tmp_path)
    assert [source[i]["label"] for i in range(len(source))] == ["cat"] * 3 + ["dog"] * 3
    assert re.search(r" 2 \w+ 6 ", caplog.text)
    assert captions_by_key(open_at(tmp_path / "cat")) == {"0": ("credits",), "1": (), "2": ()}


ANNOTATIONS = {
    "labelme": (
        ".json",
        json.dumps({"version": "5.0", "shapes": [{"label": "nose", "points": []}]}),
    ),
    "YOLO": (".txt", "0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4\n"),
    "json that is a list": (".json", "[]"),
    "captions": (".txt", "a pet"),
}


def write_classes(root: Path, image: bytes, files: dict[str, str]) -> None:
    """Two classes of three images, each with these files beside it."""
    for name in ("dog", "cat"):
        (root / name).mkdir(parents=True)
        for n in range(3):
            (root / name / f"{n}.jpg").write_bytes(image)
            for suffix, content in files.items():
                (root / name / f"{n}{suffix}").write_text(content)


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_folders_of_classes_whose_images_have_annotations_are_labels(tmp_path, image, name):
    """Captions beside the images are there as well; templates are captions of the classes alone."""
    suffix, content = ANNOTATIONS[name]
    write_classes(tmp_path, image, {suffix: content})
    for labelled in (True, False):
        source = open_source(SourceConfig(path=str(tmp_path)), labelled=labelled)
        examples = [source[i] for i in range(len(source))]
        assert [example["label"] for example in examples] == ["cat"] * 3 + ["dog"] * 3
        assert all(example.get("label_is_folder") for example in examples)
        expected = tuple(content.splitlines()) if suffix == ".txt" else ()
        assert {example["captions"] for example in examples} == {expected}
    source = open_at(tmp_path, templates=("a {}",))
    found = [(source[i]["captions"], source[i]["label"]) for i in range(len(source))]
    assert found == [((f"a {label}",), label) for label in ("cat", "dog") for _ in range(3)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({".txt": "a pet", ".cls": "7"}, "7"),
        ({".json": '{"caption": "a pet", "label": 8}'}, "8"),
    ],
)
def test_labels_beside_images_win_over_their_folders(tmp_path, image, files, expected):
    write_classes(tmp_path, image, files)
    source = open_at(tmp_path)
    assert {source[i]["label"] for i in range(len(source))} == {expected}


def test_numbered_folders_of_img2dataset_are_no_classes(tmp_path, image):
    write_files(tmp_path, image)
    for templates in ((), ("a {}",)):
        source = open_at(tmp_path, templates=templates)
        assert {source[i]["label"] for i in range(len(source))} == {None}
        assert captions_by_key(source) == FILES


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
