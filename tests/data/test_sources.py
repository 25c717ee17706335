import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, Source, usable_label
from lit_jax.data.files import line_offsets
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.data.sources.tfds import TfdsSource
from lit_jax.errors import UserError
from tests.digits import open_digits
from tests.object_store.served import BUCKET, serve

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


FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "caption": tfds.features.Text(),
    "several": tfds.features.Sequence(tfds.features.Text()),
    "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    "name": tfds.features.Text(),
    "number": tfds.features.Scalar(np.int64),
    "languages": {"en": tfds.features.Text(), "words": np.int64},
}


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory, noise, encode) -> Path:
    """Five examples in 'train', one in 'test', none in 'empty', as `tfds build` would prepare them."""
    folder = tmp_path_factory.mktemp("made") / "1.0.0"
    folder.mkdir()
    features = tfds.features.FeaturesDict(FEATURES)
    splits = []
    for split, count in (("train", 5), ("test", 1), ("empty", 0)):
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="made", split=split, filetype_suffix="array_record"
        )
        writer = ArrayRecordWriter(
            str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1"
        )
        for i in range(count):
            example = {
                "image": encode(noise(4, 7, 3, seed=i)),
                "caption": CAPTIONS[i],
                "several": CAPTIONS[:i],
                "captions": [{"id": n, "text": text} for n, text in enumerate(CAPTIONS[:i])],
                "label": i % 2,
                "name": f"number {i}",
                "number": i,
                "languages": {"en": "a dog", "words": 2},
            }
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[count], num_bytes=1, filename_template=template
            )
        )
    identity = DatasetIdentity(
        name="made", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="made"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)
    return folder


@pytest.fixture
def tfds_config(tfds_folder) -> SourceConfig:
    return SourceConfig(path=str(tfds_folder), split="train")


def test_tfds_rows_become_examples(tfds_config, noise):
    source = open_source(tfds_config)
    assert isinstance(source, TfdsSource)
    assert len(source) == 5
    example = source[3]
    assert (example["key"], example["label"]) == ("train/3", "dog")
    assert example["captions"] == (CAPTIONS[3],)
    np.testing.assert_array_equal(np.asarray(decode(example["image"])), noise(4, 7, 3, seed=3))


@pytest.mark.parametrize("store", ["s3://nobody:none", "gs://anonymous"])
def test_tfds_data_in_an_object_store_are_the_same(tfds_config, store, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serve(Path(tfds_config.path).parent) as address:
        path = address(f"{store}@{BUCKET}/1.0.0")
        source = open_source(dataclasses.replace(tfds_config, path=path))
        copied = {file.name for file in tmp_path.rglob("made-*")}
        with pytest.raises(UserError, match="train"):
            open_source(dataclasses.replace(tfds_config, path=path, split="none"))
    assert copied == {"made-train.array_record-00000-of-00001"}
    local = open_source(tfds_config)
    assert [source[i] for i in range(len(source))] == [local[i] for i in range(len(local))]


@pytest.mark.parametrize("key", ["several", "captions/text"])
def test_tfds_captions_may_be_several(tfds_config, key):
    source = open_source(dataclasses.replace(tfds_config, caption_key=key))
    assert captions_of(source) == [tuple(CAPTIONS[:i]) for i in range(5)]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("captions", r"captions/id, captions/text"),
        ("languages", r"languages/en, languages/words"),
        ("captions/txt", ""),
        ("nothing", ""),
        ("captions/id", r"int64"),
        ("number", r"int64"),
        ("languages/words", r"int64"),
        ("label", r"ClassLabel"),
    ],
)
def test_tfds_captions_are_texts(tfds_config, key, reason):
    with pytest.raises(UserError, match=rf"caption_key .*'{key}', .*{reason}") as raised:
        open_source(dataclasses.replace(tfds_config, caption_key=key))
    assert "(caption, captions/text, languages/en, name, several)" in str(raised.value)
    nested = open_source(dataclasses.replace(tfds_config, caption_key="languages/en"))
    assert nested[0]["captions"] == ("a dog",)


@pytest.mark.parametrize("key", ["captions/id", "several", "languages", "nothing"])
def test_tfds_labels_are_single_values(tfds_config, key):
    with pytest.raises(UserError, match=rf"label_key .*'{key}', .*\(.*\)"):
        open_source(dataclasses.replace(tfds_config, label_key=key))


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("train[7:3]", r"'train'"),
        ("train[5:3]", ""),
        ("train[:0]", ""),
        ("train[2%:1%]", ""),
        ("train[", r"'train'"),
        ("train[:200%]", r"'train'"),
        ("train[100:200]", r"'train'"),
        ("train+dev", r"test, train"),
        ("[1:2]", r"test, train"),
    ],
)
def test_tfds_splits_that_name_nothing_are_refused(tfds_config, split, reason):
    with pytest.raises(UserError, match=rf"{re.escape(split)}'.*{reason}"):
        open_source(dataclasses.replace(tfds_config, split=split))


@pytest.mark.parametrize("inside", [("1.0.0", "2.0.0"), ("en/1.0.0", "de/1.0.0"), ("1.0.0",)])
@pytest.mark.parametrize("split", [None, "train"])
def test_tfds_versions_are_named(tfds_folder, tmp_path, inside, split):
    for version in inside:
        shutil.copytree(tfds_folder, tmp_path / version)
    with pytest.raises(UserError, match=rf"TFDS .*{', '.join(sorted(inside))};"):
        open_source(SourceConfig(path=str(tmp_path), split=split))


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


def test_tfds_labels_and_captions_are_optional(tfds_config):
    named = open_source(dataclasses.replace(tfds_config, caption_key="", label_key="name"))
    assert (named[2]["captions"], named[2]["label"]) == ((), "number 2")
    captioned = open_source(dataclasses.replace(tfds_config, label_key=""))
    assert captioned[2]["label"] is None


def test_tfds_examples_may_be_without_a_label(tfds_folder, tmp_path, noise, encode):
    folder = shutil.copytree(tfds_folder, tmp_path / "1.0.0")
    (shard,) = folder.glob("*train*array_record*")
    features = tfds.features.FeaturesDict({**FEATURES, "label": tfds.features.Scalar(np.int64)})
    example = {"image": encode(noise(4, 7, 3)), "caption": "", "name": ""}
    example |= {"several": [], "captions": [], "number": 0}
    example["languages"] = {"en": "", "words": 0}
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for label in (-1, 0, 2, -2, 1):
        encoded = features.encode_example({**example, "label": label})
        writer.write(features.serialize_example(encoded))
    writer.close()
    source = open_source(SourceConfig(path=str(folder), split="train"))
    assert [source[i]["label"] for i in (0, 1, 4)] == [None, "cat", "dog"]
    for index in (2, 3):
        assert source[index]["captions"] == ("",)  # good for all that does without labels
        with pytest.raises(BadSampleError, match=r'"label" .*-?2, .*2') as raised:
            usable_label(source[index])
        assert raised.value.kind == "no_example"


def test_tfds_split_may_be_a_part(tfds_config):
    source = open_source(dataclasses.replace(tfds_config, split="train[3:]"))
    assert captions_of(source) == [(CAPTIONS[3],), (CAPTIONS[4],)]


@pytest.mark.parametrize("split", [None, "", "valid"])
def test_tfds_splits_are_listed(tfds_config, split):
    with pytest.raises(UserError, match=r"test, train") as raised:
        open_source(dataclasses.replace(tfds_config, split=split))
    assert "None" not in str(raised.value)
    assert ("'valid'" in str(raised.value)) == (split == "valid")


def test_tfds_empty_split_is_refused(tfds_config):
    with pytest.raises(UserError, match=r"'empty'"):
        open_source(dataclasses.replace(tfds_config, split="empty"))


@pytest.mark.parametrize(
    "keys",
    [{"image_key": "picture"}, {"image_key": "label"}, {"caption_key": "x", "label_key": "y"}],
)
def test_tfds_features_are_listed(tfds_config, keys):
    with pytest.raises(UserError, match=r"captions/id, captions/text"):
        open_source(dataclasses.replace(tfds_config, **keys))


def test_tfds_needs_array_record(tfds_folder, tmp_path):
    for name in ("features.json", "label.labels.txt"):
        (tmp_path / name).write_bytes((tfds_folder / name).read_bytes())
    info = (tfds_folder / "dataset_info.json").read_text()
    (tmp_path / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"ArrayRecord .*--file_format=array_record"):
        open_source(SourceConfig(path=str(tmp_path), split="train"))


def test_sources_can_be_sent_to_workers(tfds_config, jsonl_folder):
    jsonl = jsonl_folder({"image": f"{i}.png", "caption": c} for i, c in enumerate(CAPTIONS))
    for source in (open_source(tfds_config), open_folder(jsonl), open_digits("unseen")):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[4]["captions"] == source[4]["captions"]


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_tfds_damaged_files_are_refused(tfds_folder, tmp_path, file):
    folder = shutil.copytree(tfds_folder, tmp_path / "1.0.0")
    (folder / file).write_text("{")
    with pytest.raises(UserError, match=r"1\.0\.0 .*\("):
        open_source(SourceConfig(path=str(folder), split="train"))


def test_tfds_damaged_shards_make_bad_samples(tfds_folder, tmp_path):
    folder = shutil.copytree(tfds_folder, tmp_path / "1.0.0")
    (shard,) = folder.glob("*train*array_record*")
    content = shard.read_bytes()
    for left in (len(content) // 2, 0):
        shard.write_bytes(content[:left])
        source = open_source(SourceConfig(path=str(folder), split="train"))
        with pytest.raises(BadSampleError, match=r"train/4 .*\(") as raised:
            source[4]
        assert raised.value.kind == "damaged"
        with pytest.raises(IndexError):
            source[5]


def test_tables_beside_the_one_that_is_read_are_told(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "a"}')
    (tmp_path / "b.csv").write_text("image,caption\na.jpg,b\n")
    assert open_source(SourceConfig(path=str(tmp_path)))[0]["captions"] == ("a",)
    assert re.search(r"a\.jsonl .*b\.csv", caplog.text)
    caplog.clear()
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    open_source(SourceConfig(path=str(tmp_path), split="train"))
    assert not caplog.text
