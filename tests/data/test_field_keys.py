"""image_key, caption_key and label_key: a name that the data do not have is never ignored."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.convert import main as convert
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError

KEYS = ("image_key", "caption_key", "label_key")


@pytest.fixture
def image(tmp_path, noise, encode) -> bytes:
    content = encode(noise(4, 7, 3), "JPEG")
    (tmp_path / "a.jpg").write_bytes(content)
    return content


def open_at(path: Path, **config):
    return open_source(SourceConfig(path=str(path), **config))


def refused(path: Path, keys=KEYS) -> None:
    """Assert that each of these keys, set to a name that does not exist, is an error that shows the name."""
    assert len(open_at(path))
    for key in keys:
        with pytest.raises(UserError, match=r"\bother\b"):
            open_at(path, **{key: "other"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions_val.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}),
        (
            "dataset_coco.json",
            {"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "a"}]}]},
        ),
        ("captions.txt", "image,caption\na.jpg,a dog\n"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a dog\n"),
        ("a.jsonl", '{"image": "a.jpg", "captions": ["a dog"], "label": "dog"}\n'),
        ("a.ndjson", '{"image": "a.jpg", "caption": "a dog"}\n'),
        ("metadata.csv", "image_file_name,text\na.jpg,a dog\n"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a dog", "label": "dog"}\n'),
        ("a.csv", "image,caption,label\na.jpg,a dog,dog\n"),
        ("a.tsv", "a dog\ta.jpg\n"),
        ("a.json", [{"image": "a.jpg", "caption": "a dog"}]),
    ],
)
def test_a_list_refuses_names_that_it_does_not_have(tmp_path, image, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    # A list of two columns without names takes the names of the keys.
    refused(tmp_path / name, KEYS if name != "a.tsv" else ("label_key",))


def test_a_parquet_table_refuses_names_that_it_does_not_have(tmp_path, image):
    table = pa.table({"image": [image], "captions": [["a dog"]], "label": ["dog"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path)
    # An empty name stands for none.
    assert open_at(tmp_path, label_key="")[0]["label"] is None


def test_records_and_folders_of_classes_refuse_all_names(tmp_path, image):
    folder = tmp_path / "classes" / "dog"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(image)
    refused(folder.parent)
    assert convert([f"--source.path={folder.parent}", f"--output={tmp_path / 'records'}"]) == 0
    refused(tmp_path / "records")


def test_samples_read_captions_and_label_from_the_fields_that_are_named(tmp_path, image):
    about = {"caption": "a dog", "breed": "collie", "title": "Rex"}
    members = {
        "a.jpg": image,
        "a.txt": b"a dog",
        "a.cls": b"3",
        "a.json": json.dumps(about).encode(),
    }
    for folder in (
        tmp_path / "tar",
        tmp_path / "files",
        tmp_path / "files/0",
        tmp_path / "files/1",
    ):
        folder.mkdir()
    with tarfile.open(tmp_path / "tar/0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            for part in "01":
                (tmp_path / "files" / part / name).write_bytes(content)
    for folder in (tmp_path / "tar", tmp_path / "files"):
        refused(folder)
        example = open_at(folder, caption_key="title", label_key="breed")[0]
        assert (example["captions"], example["label"]) == (("Rex",), "collie")
        assert open_at(folder)[0]["label"] == "3"


def test_folders_are_no_classes_if_the_label_has_a_name(tmp_path, image):
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.jpg").write_bytes(image)
        about = {"caption": "a dog"} | ({"breed": "collie"} if part == "y" else {})
        (tmp_path / part / "a.json").write_text(json.dumps(about))
    (tmp_path / "a.jpg").unlink()
    assert [open_at(tmp_path)[i]["label"] for i in range(2)] == ["x", "y"]
    named = open_at(tmp_path, label_key="breed")
    assert [named[i]["label"] for i in range(2)] == [None, "collie"]
