"""Lists of rows in JSON, and metadata of image folders, as Hugging Face, BLIP and others write them."""

import csv
import json
import re

import pyarrow as pa
import pytest
from datasets import load_dataset
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data import sources
from lit_jax.data.example import BadSampleError
from lit_jax.data.image import decode
from lit_jax.data.sources import FORMATS, open_source
from lit_jax.data.sources.json_list import is_list_of_rows
from lit_jax.errors import UserError
from tests.data.test_lists import opened

ROWS = [
    {"file_name": "a.png", "text": "a dog", "label": 3},
    {"file_name": "deep/b.png", "text": "ein Hund, naß", "label": 1},
    {"file_name": "a.png", "text": "one dog", "label": 3},
]


def write_metadata(folder, kind, rows, encode, noise):
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (folder / name).write_bytes(encode(noise(4, 7, 3)))
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(text)
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("split", [None, "train"])
def test_image_folders_of_hugging_face_are_read_by_their_metadata(
    tmp_path, kind, split, encode, noise
):
    """As `datasets` itself reads them."""
    for part in (split, "test") if split else (".",):
        write_metadata(tmp_path / part, kind, ROWS, encode, noise)
    examples = opened(tmp_path, split=split)
    assert [e["captions"] for e in examples] == [("a dog", "one dog"), ("ein Hund, naß",)]
    assert [e["label"] for e in examples] == ["3", "1"]
    if kind == "jsonl":  # it leaves files of the other kinds open
        read = load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "c"))
        assert read["train"]["text"] == [row["text"] for row in ROWS]
    for example in examples:
        assert decode(example["image"]).size == (7, 4)
    if split:
        with pytest.raises(UserError, match=r"config\.data\.train\.split"):
            opened(tmp_path)


def test_names_of_columns_that_the_user_sets_are_kept(tmp_path, encode, noise):
    rows = [{**row, "label": 3, "caption": "c", "long": "l", "image": "deep/b.png"} for row in ROWS]
    write_metadata(tmp_path, "jsonl", rows, encode, noise)
    for keys, caption, count in (
        ({}, "c", 1),
        ({"caption_key": "long", "image_key": "file_name"}, "l", 2),
        ({"caption_key": "text"}, "a dog", 1),
    ):
        examples = opened(tmp_path, **keys)
        assert (examples[0]["captions"][0], len(examples)) == (caption, count)


def test_half_an_emoji_in_the_name_of_a_split_is_shown_replaced(tmp_path):
    images = [{"filename": "a.png", "split": "te\ud83d", "sentences": [{"raw": "a"}]}]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match="te\ufffd"):
        opened(tmp_path, split="val")


# A damaged item would damage its whole list.
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("list.json", '{"file_name": "b.png"}'),
        ("metadata.jsonl", '{"file_name": "b.png"}'),
        ("metadata.jsonl", "{damaged"),
        ("metadata.jsonl", "[" * 100_000),
        ("metadata.jsonl", "7"),
    ],
)
def test_the_first_row_alone_does_not_decide_the_names_of_columns(
    tmp_path, name, first, encode, noise
):
    rows = [first, '{"file_name": "a.png", "text": "a dog"}']
    text = f"[ {', '.join(rows)}]" if name == "list.json" else "\n".join(rows)
    (tmp_path / name).write_text(text)
    for image in ("a.png", "b.png"):
        (tmp_path / image).write_bytes(encode(noise(4, 7, 3)))
    assert open_source(SourceConfig(path=str(tmp_path)))[1]["captions"] == ("a dog",)


def test_one_split_of_metadata_is_no_class(tmp_path, encode, noise):
    write_metadata(tmp_path / "train", "jsonl", ROWS, encode, noise)
    with pytest.raises(UserError, match=r"config\.data\.train\.split"):
        opened(tmp_path)


def test_one_of_several_metadata_files_is_read_and_named(tmp_path, encode, noise, caplog):
    write_metadata(tmp_path, "jsonl", ROWS, encode, noise)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,another\n")
    assert opened(tmp_path)[0]["captions"] == ("a dog", "one dog")
    assert re.search(r"metadata\.jsonl .*metadata\.csv", caplog.text)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_above_the_folders_of_splits_is_no_split(tmp_path, kind, encode, noise):
    """`datasets` would give all rows to each split."""
    rows = [{**row, "file_name": f"{part}/a.png"} for part in ("train", "test") for row in ROWS]
    write_metadata(tmp_path, kind, rows, encode, noise)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.png").write_bytes(encode(noise(4, 7, 3)))
    assert len(opened(tmp_path)) == 4  # of two labels in each
    with pytest.raises(UserError, match=rf"test, train.*test.metadata\.{kind}"):
        opened(tmp_path, split="test")
    (tmp_path / "test" / "captions.jsonl").write_text('{"image": "a.png", "caption": "own"}\n')
    assert [example["captions"] for example in opened(tmp_path, split="test")] == [("own",)]


def test_a_table_of_classes_above_the_folders_of_splits_is_not_in_the_way(tmp_path, encode, noise):
    (tmp_path / "classes.csv").write_text("id,name\n0,cat\n")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "a.png").write_bytes(encode(noise(4, 7, 3)))
    assert [example["label"] for example in opened(tmp_path, split="test")] == ["cat"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_names_of_files_in_capitals_are_the_same_formats(tmp_path, kind, encode, noise):
    write_metadata(tmp_path, kind, ROWS, encode, noise)
    for name in (f"METADATA.{kind.upper()}", f"Metadata.{kind.title()}"):
        next(f for f in tmp_path.iterdir() if f.name.lower() == f"metadata.{kind}").rename(
            tmp_path / name
        )
        assert [e["captions"][0] for e in opened(tmp_path)] == ["a dog", "ein Hund, naß"]
        assert opened(tmp_path / name)[0]["captions"] == ("a dog", "one dog")


JSON_LISTS = {
    "BLIP's training": (
        [{"caption": f"c {n}", "image": "a.png", "image_id": "coco_1"} for n in range(2)],
        [("c 0", "c 1")],
    ),
    "BLIP's test": ([{"image": "a.png", "caption": ["c 0", "犬 {", "]"]}], [("c 0", "犬 {", "]")]),
    "LLaVA": ([{"id": "1", "image": "a.png", "caption": 'a "dog"', "url": "http"}], [('a "dog"',)]),
    "other names": ([{"file_name": "a.png", "text": "a dog"}], [("a dog",)]),
}


@pytest.mark.parametrize("name", JSON_LISTS)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("place", [".", "images", "../images"])
@pytest.mark.parametrize("file", ["coco_karpathy_test.json", "dataset_a.json", "captions_a.json"])
def test_a_json_list_of_rows_is_read(tmp_path, name, indent, place, file, encode, noise):
    rows, captions = JSON_LISTS[name]
    folder = tmp_path / "data"
    (folder / place).mkdir(parents=True)
    (folder / place / "a.png").write_bytes(encode(noise(4, 7, 3)))
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    (folder / file).write_text("\ufeff" * (indent is None) + text, encoding="utf-8")
    for path in (folder, folder / file):
        examples = opened(path)
        assert [example["captions"] for example in examples] == captions
        assert decode(examples[0]["image"]).size == (7, 4)


@pytest.mark.parametrize("escaped", [True, False])
def test_rows_of_a_json_list_may_name_images_and_captions_by_other_keys(
    tmp_path, encode, noise, escaped
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(noise(4, 7, 3)))
    rows = [{"id": 1, "画像": "a.png", "sentence": "a"}]
    (tmp_path / "train.json").write_text(json.dumps(rows, ensure_ascii=escaped), "utf-8")
    keys = {"image_key": "画像", "caption_key": "sentence"}
    for path in (tmp_path, tmp_path / "train.json"):
        (example,) = open_source(SourceConfig(path=str(path), **keys))
        assert example["captions"] == ("a",)
        assert example["image"] == tmp_path / "images" / "a.png"
    with pytest.raises(UserError, match="image_key"):
        opened(tmp_path / "train.json")


def test_bad_rows_of_a_json_list_are_bad_samples(tmp_path, encode, noise):
    (tmp_path / "a.png").write_bytes(encode(noise(4, 7, 3)))
    rows = [{"image": "a.png", "caption": "a"}, 7, {"image": 3}, {"image": "b.png", "caption": [1]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert source[0]["captions"] == ("a",)
    for n in (1, 2, 3):
        with pytest.raises(BadSampleError, match=rf"{n} .*a\.json") as raised:
            source[n]
        assert raised.value.kind == "no_example"


@pytest.mark.parametrize("end", ["", ",", ",]", "] x", "}]", '{"image": "b"}]'])
def test_a_damaged_json_list_is_refused(tmp_path, end):
    (tmp_path / "a.json").write_text('[{"image": "a.png", "caption": "a"}' + end)
    with pytest.raises(UserError, match=r"a\.json .*JSON"):
        opened(tmp_path)


def test_an_item_that_is_nested_too_deep_is_named(tmp_path):
    row = {"image": "a.png", "caption": "a"}
    deep = json.dumps(row).replace('"a"}', "[" * 100_000 + "]" * 100_000 + "}")
    text = f"[{json.dumps(row)}, {deep}, {json.dumps(row)}]"
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json .*item 1, at character {text.index(deep)}, "):
        opened(tmp_path)


def test_other_json_files_beside_classes_are_no_data(tmp_path, encode, noise):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.png").write_bytes(encode(noise(4, 7, 3)))
    for n, content in enumerate((["cat", "dog"], {"0": "cat"}, [{"name": "cat"}], [], 7)):
        (tmp_path / f"{n}.json").write_text(json.dumps(content))
    assert [example["label"] for example in opened(tmp_path)] == ["cat", "dog"]


def test_thousands_of_json_files_are_not_looked_into(tmp_path, monkeypatch):
    """In an object store each would be a request."""
    (tmp_path / "pairs").mkdir()
    for n in range(100):
        (tmp_path / f"pairs/{n}.json").write_text('[{"image": "a.png"}]')
    looked_into = []
    kinds = [
        k._replace(fits=lambda file, _: looked_into.append(file))
        if k.fits is is_list_of_rows
        else k
        for k in FORMATS
    ]
    monkeypatch.setattr(sources, "FORMATS", tuple(kinds))
    with pytest.raises(UserError, match=rf"'{tmp_path}/pairs'.*captions\.jsonl"):
        opened(tmp_path / "pairs")
    assert not looked_into
