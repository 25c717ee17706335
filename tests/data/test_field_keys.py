"""image_key, caption_key and label_key: a name that the data do not have is refused or told."""

import io
import json
import tarfile
from collections.abc import Mapping
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


def warned(caplog, path: Path) -> None:
    """Assert that each key of a field in JSON, set to a name that no row has, is told with the name."""
    for key in ("caption_key", "label_key"):
        caplog.clear()
        open_at(path, **{key: "other"})
        (said,) = [m for m in caplog.messages if "'other'" in m]
        assert key in said
        assert str(path) in said


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
        ("metadata.csv", "image_file_name,text\na.jpg,a dog\n"),
        ("a.csv", "image,caption,label\na.jpg,a dog,dog\n"),
        ("a.tsv", "a dog\ta.jpg\n"),
    ],
)
def test_a_list_refuses_names_that_it_does_not_have(tmp_path, image, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    # A list of two columns without names takes the names of the keys.
    refused(tmp_path / name, KEYS if name != "a.tsv" else ("label_key",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"image": "a.jpg", "captions": ["a dog"], "label": "dog"}\n'),
        ("a.ndjson", '{"image": "a.jpg", "caption": "a dog"}\n'),
        ("metadata.jsonl", '{"image": "a.jpg", "caption": "a dog", "label": "dog"}\n'),
        ("a.json", '[{"image": "a.jpg", "caption": "a dog"}]'),
    ],
)
def test_a_list_of_json_warns_of_names_that_no_row_has(tmp_path, image, caplog, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, ("image_key",))
    warned(caplog, tmp_path / name)


def test_a_field_that_begins_after_the_rows_that_are_checked_is_read(tmp_path, image):
    rows = [{"image": "a.jpg", "caption": f"{i}"} for i in range(1001)]
    rows[1000]["class"] = "dog"
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = open_at(tmp_path / "a.jsonl", label_key="class", group_captions=False)
    assert [source[i]["label"] for i in (999, 1000)] == [None, "dog"]


def test_a_column_may_be_in_a_later_parquet_file_alone(tmp_path, image):
    table = pa.table({"image": [image], "caption": ["a dog"]})
    parquet.write_table(table, tmp_path / "0.parquet")
    parquet.write_table(table.append_column("class", pa.array(["dog"])), tmp_path / "1.parquet")
    source = open_at(tmp_path, label_key="class")
    assert [source[i]["label"] for i in range(2)] == [None, "dog"]
    refused(tmp_path)


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


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_few_labelled_samples_of_a_tar_are_enough(tmp_path, image):
    samples = [(f"{i:03}", b'{"class": "dog"}' if i == 100 else b"{}") for i in range(200)]
    write_tar(
        tmp_path / "0.tar",
        {
            n: c
            for key, about in samples
            for n, c in ((f"{key}.jpg", image), (f"{key}.json", about))
        },
    )
    source = open_at(tmp_path, label_key="class")
    assert [source[i]["label"] for i in (99, 100)] == [None, "dog"]


def test_a_wrong_name_is_told_although_the_json_of_a_tar_has_captions(tmp_path, image, caplog):
    write_tar(tmp_path / "0.tar", {"a.jpg": image, "a.json": b'{"captions": ["a dog"]}'})
    warned(caplog, tmp_path)
    assert open_at(tmp_path)[0]["captions"] == ("a dog",)


def test_samples_read_captions_and_label_from_the_fields_that_are_named(tmp_path, image, caplog):
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
    write_tar(tmp_path / "tar/0.tar", members)
    for name, content in members.items():
        for part in "01":
            (tmp_path / "files" / part / name).write_bytes(content)
    for folder in (tmp_path / "tar", tmp_path / "files"):
        refused(folder, ("image_key",))
        warned(caplog, folder)
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
