"""Sources in general, and captions.jsonl."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.files import line_offsets
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError

CAPTIONS = ["ein Hund läuft", "犬が走る", "كلب يجري", "un café", "un cafe\u0301", "👩‍👧 and a dog"]


def open_folder(folder: Path) -> Source:
    return open_source(SourceConfig(path=str(folder)))


def captions_of(source) -> list[tuple[str, ...]]:
    return [source[i]["captions"] for i in range(len(source))]


@pytest.mark.parametrize("path", ["", "."])
def test_a_missing_data_set_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"features\.json.*captions\.jsonl"):
        open_source(SourceConfig(path=path))


def test_jsonl_rows_become_examples(jsonl_folder, noise):
    folder = jsonl_folder(
        [
            {"image": "a.png", "caption": CAPTIONS[0]},
            {"image": "b.png", "captions": CAPTIONS[1:], "label": "犬", "key": "second"},
            {"image": "c.png", "caption": "first", "captions": ["then"]},
            {"image": "d.png", "label": "dog", "caption": None},
        ]
    )
    first, second, both, labelled = open_source(SourceConfig(path=str(folder)))
    assert (first["key"], first["captions"], first["label"]) == ("a.png", (CAPTIONS[0],), None)
    assert second["captions"] == tuple(CAPTIONS[1:])
    assert (second["key"], second["label"]) == ("second", "犬")
    assert both["captions"] == ("first", "then")
    assert (labelled["captions"], labelled["label"]) == ((), "dog")
    np.testing.assert_array_equal(np.asarray(decode(second["image"])), noise(4, 7, 3, seed=1))


def test_jsonl_of_texts_alone_is_for_a_text_tower_that_learns(tmp_path):
    rows = [
        {"caption": "ein Hund", "teacher_caption": "a dog"},
        {"captions": ["a cat", "one cat"], "key": "cat"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "captions.jsonl").write_text(text)
    source = open_source(SourceConfig(path=str(tmp_path)), text_only=True)
    assert [source[i]["key"] for i in range(2)] == ["ein Hund", "cat"]
    assert [source[i].get("teacher_caption") for i in range(2)] == ["a dog", None]
    assert source[0]["image"] is None
    with pytest.raises(UserError, match=r'0 .*"image"'):
        open_source(SourceConfig(path=str(tmp_path)))


def test_jsonl_image_may_be_an_absolute_path(tmp_path, jsonl_folder):
    folder = jsonl_folder([{"image": str(tmp_path / "elsewhere.png"), "caption": "a"}])
    assert decode(open_folder(folder)[0]["image"]).size == (7, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.lists(st.text(), min_size=1, max_size=5),
    blanks=st.lists(st.sampled_from(["", " ", "\t ", "\r"]), min_size=6, max_size=6),
    mark=st.sampled_from(["", "\ufeff"]),
    line_break=st.sampled_from(["\n", "\r\n"]),
    ended=st.booleans(),
    block_bytes=st.integers(1, 80),
)
def test_lines_are_found_in_any_layout(
    tmp_path, captions, blanks, mark, line_break, ended, block_bytes
):
    lines = [
        json.dumps({"image": f"{i}", "caption": c}, ensure_ascii=True)
        for i, c in enumerate(captions)
    ]
    spread = [line for pair in zip(blanks, lines, strict=False) for line in pair]
    text = mark + line_break.join(spread) + (line_break if ended else "")
    (tmp_path / "captions.jsonl").write_bytes(text.encode())
    source = open_folder(tmp_path)
    assert captions_of(source) == [(c,) for c in captions]
    np.testing.assert_array_equal(
        line_offsets(tmp_path / "captions.jsonl", block_bytes=block_bytes),
        line_offsets(tmp_path / "captions.jsonl"),
    )


def test_jsonl_image_may_be_a_mapping_without_a_caption(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image": {"path": "a.png"}, "label": 3}')
    example = open_folder(tmp_path)[0]
    assert (example["key"], example["image"]) == ("a.png", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "a.png", "caption": ', "Expecting value"),
        ('["a.png", "a dog"]', r"JSON"),
        ('{"caption": "a dog"}', r'"image"'),
        ('{"image": 7}', r'"image" .*7'),
        ('{"image": "a.png", "caption": {"a": 1}}', r"\"caption\" .*\{'a': 1\}"),
        ('{"image": "a.png", "captions": ["a", 7]}', '"captions"'),
        ('{"image": "https://a.b/c.jpg", "caption": "a"}', "img2dataset"),
        ('{"image": "ftp://a.b/c.jpg", "caption": "a"}', "s3://BUCKET/PATH"),
        ('{"image": "file:///c.jpg", "caption": "a"}', "s3://BUCKET/PATH"),
        ('{"image": {"path": 3}, "caption": "a"}', r'"path" .*3'),
        ('{"image": {"bytes": "iVBO"}, "caption": "a"}', r"\"bytes\" .*'iVBO'"),
        ('{"image": "", "caption": "a"}', r'"image"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    good, other = (f'{{"image": "{x}.png", "caption": "a dog"}}\n'.encode() for x in "gh")
    (tmp_path / "captions.jsonl").write_bytes(good + b"\n" + line.encode() + b"\n" + other)
    source = open_folder(tmp_path)
    place = rf"line at byte {len(good) + 1} of .*captions\.jsonl"
    with pytest.raises(BadSampleError, match=rf"{place} .*\(.*{reason}") as raised:
        source[1]
    assert raised.value.kind == ("missing" if reason == '"image"' else "no_example")
    assert source[2]["captions"] == ("a dog",)


def test_a_file_of_another_format_is_refused_at_once(tmp_path):
    (tmp_path / "Pairs.jsonl").write_text("image,caption\na.png,a dog\n")
    with pytest.raises(UserError, match=r"0 .*Pairs\.jsonl"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "captions.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"captions\.jsonl"):
        open_folder(tmp_path)


def test_jsonl_has_no_splits(jsonl_folder):
    folder = jsonl_folder([{"image": "a.png", "caption": "a"}])
    with pytest.raises(UserError, match=r"'train'"):
        open_source(SourceConfig(path=str(folder), split="train"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("made-train.tfrecord-00000-of-00001", "--file_format=array_record"),
        ("dataset_info.json", "`tfds build`"),
        ("dataset_infos.json", "`tfds build`"),
        ("data-train-00000-of-00001.arrow", "save_to_disk"),
        ("00000.tar.gz", "unpack"),
        ("PAIRS.JSONL.GZ", "unpack"),
        ("pairs.xlsx", "CSV"),
        ("pairs.json", r"\*\.jsonl"),
    ],
)
def test_what_is_no_data_set_is_named_with_what_to_do(tmp_path, name, hint):
    (tmp_path / name).write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{re.escape(name)}: .*{hint}"):
            open_source(SourceConfig(path=str(path)))


def test_a_table_in_partitions_is_refused_as_a_whole(tmp_path):
    table = pa.table({"image": ["a", "b"], "caption": ["a", "b"], "label": [0, 1]})
    parquet.write_to_dataset(table, tmp_path, partition_cols=["label"])
    with pytest.raises(UserError, match=r"label=0, label=1\), .*partitions, as files in one"):
        open_source(SourceConfig(path=str(tmp_path)))


def test_the_cache_of_load_dataset_is_named_by_its_arrow_file(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "json-train.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"json-train\.arrow: .*save_to_disk"):
        open_source(SourceConfig(path=str(tmp_path)))


def test_tables_beside_the_one_that_is_read_are_told(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "a"}')
    (tmp_path / "b.csv").write_text("image,caption\na.jpg,b\n")
    assert open_source(SourceConfig(path=str(tmp_path)))[0]["captions"] == ("a",)
    assert re.search(r"a\.jsonl .*b\.csv", caplog.text)
    caplog.clear()
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    open_source(SourceConfig(path=str(tmp_path), split="train"))
    assert not caplog.text
