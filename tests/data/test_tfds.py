"""Data sets that TFDS has prepared."""

import dataclasses
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, usable_label
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.data.sources.tfds import TfdsSource
from lit_jax.errors import UserError
from tests.data.test_sources import CAPTIONS, captions_of, open_folder
from tests.digits import open_digits
from tests.object_store.served import BUCKET, serve

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
