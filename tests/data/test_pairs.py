"""Images and texts in files of one name, in folders: img2dataset's default, classes with annotations."""

import contextlib
import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from tests.data.test_samples import open_at
from tests.object_store.served import BUCKET, serve


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
