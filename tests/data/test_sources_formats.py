"""Every format, written by the tools that people use for it, on disk and in an object store."""

import json
import os
import pickle
import resource
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.fs import GcsFileSystem

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError
from lit_jax.data.files import ObjectPath, locate
from lit_jax.data.image import decode
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from tests.data.formats import CAPTIONS, CLASSES, FORMATS, N, flat, write_parquet
from tests.object_store.served import BUCKET, serve


def check(source, name: str, images) -> None:
    _, _, captions, labels = FORMATS[name]
    examples = [source[i] for i in range(len(source))]
    # A folder by classes comes in the order of its paths.
    order = sorted(range(N), key=lambda i: (CLASSES[i % 2], i)) if name == "classes" else range(N)
    assert [e["captions"] for e in examples] == [(captions[i],) if captions else () for i in order]
    assert [e["label"] for e in examples] == [labels[i] for i in order]
    assert len({e["key"] for e in examples}) == N
    for example, i in zip(examples, order, strict=True):
        expected = np.asarray(decode(images[i]))
        np.testing.assert_array_equal(np.asarray(decode(example["image"])), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_examples(data, images, name):
    source = open_source(SourceConfig(path=str(data / name), split=FORMATS[name][1]))
    check(source, name, images)
    check(pickle.loads(pickle.dumps(source)), name, images)


@pytest.mark.parametrize("store", ["s3://nobody:none", "gs://anonymous"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_an_object_store(
    served, images, name, store, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = served(f"{store}@{BUCKET}/{name}")
    source = open_source(SourceConfig(path=path, split=FORMATS[name][1]))
    check(source, name, images)
    check(pickle.loads(pickle.dumps(source)), name, images)


def test_conceptual_captions_are_read_for_their_texts_too(data):
    source = open_source(SourceConfig(path=str(data / "tsv")), text_only=True)
    assert [source[i]["captions"] for i in range(len(source))] == [(flat(c),) for c in CAPTIONS]


@pytest.mark.parametrize("image", ["https://a.org/" + "a" * 300, "a" * 300], ids=["web", "long"])
def test_a_tsv_without_names_of_columns_may_have_any_second_field(tmp_path, image):
    """A name that is too long for a file is none; pictures on the web are enough for their texts."""
    file = tmp_path / "a.tsv"
    file.write_text(f"a dog\t{image}\na cat\t{image}\n")
    if image.startswith("https"):
        source = open_source(SourceConfig(path=str(file)), text_only=True)
        assert [source[i]["captions"] for i in range(2)] == [("a dog",), ("a cat",)]
    expected = "img2dataset" if image.startswith("https") else "'image'"
    with pytest.raises(UserError, match=expected):
        open_source(SourceConfig(path=str(file)))


def test_a_row_in_an_object_store_may_name_an_image_by_its_address(tmp_path, images, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(images[0])
    row = {"image": f"s3://{BUCKET}/images/0.png", "caption": "a dog"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with serve(tmp_path) as address:
        source = open_source(SourceConfig(path=address(f"s3://nobody:none@{BUCKET}/a.jsonl")))
        example = source[0]
        assert decode(example["image"]).size == (7, 4)
    assert str(example["image"]) == row["image"] == example["key"]
    assert "none" not in repr(example["image"])


def test_a_user_is_no_part_of_the_bucket():
    address = locate("gs://anonymous@bucket/data/a.tar?retry_limit_seconds=1")
    assert isinstance(address, ObjectPath)
    assert str(address) == "gs://bucket/data/a.tar"
    assert (address.user, address.options) == ("anonymous", "retry_limit_seconds=1")
    assert isinstance(address.filesystem, GcsFileSystem)
    assert address.parent.filesystem is (address.parent / "b.tar").filesystem
    beside = locate("gs://other/b.jpg", address)
    assert beside == ObjectPath("gs", PurePosixPath("other/b.jpg"), address.options, "anonymous")
    for path in ("s3://other/b.jpg", "gs://me@other/b.jpg", "gs://other/b.jpg?project_id=a"):
        assert locate(path, address) == locate(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/a?scheme=http&nonsense=1", r"gs://bucket .*'nonsense'"),
        ("s3://bucket/a?region=x&scheme=htp", r"s3://bucket .*'htp'"),
        (
            "s3://KEY:SECRET@bucket/a?endpoint_override=a b",
            r"s3://bucket .*URI: 's3://b",
        ),
        (
            "gs://anonymous@bucket/a?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1",
            r"Could not connect[^=]*; check its address",
        ),
    ],
)
def test_a_store_that_cannot_be_reached_is_told(path, message):
    with pytest.raises(UserError, match=message) as raised:
        open_source(SourceConfig(path=path))
    assert "SECRET" not in str(raised.value)


def test_an_image_at_an_address_that_means_nothing_is_a_bad_sample(tmp_path):
    row = {"image": "s3://bucket/x.png?nonsense=1", "caption": "x"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(SourceConfig(path=str(tmp_path)))
    with pytest.raises(BadSampleError, match=r"s3://bucket .*'nonsense'"):
        decode(source[0]["image"])


def test_a_google_store_that_does_not_answer_is_given_up_after_a_minute():
    """Arrow's own default is a quarter of an hour, and http without a user."""
    found = [
        locate(f"gs://anonymous@bucket/a{options}").filesystem.__reduce__()[1][0]
        for options in ("", "?scheme=http", "?retry_limit_seconds=1")
    ]
    assert [about["retry_time_limit"].total_seconds() for about in found] == [60, 60, 1]
    assert [about["scheme"] for about in found] == ["https", "http", "https"]


def test_columns_are_named_by_the_config(tmp_path, images):
    table = pa.table({"jpg": images, "text": [[c, "second"] for c in CAPTIONS]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(SourceConfig(path=str(tmp_path), image_key="jpg", caption_key="text"))
    assert source[1]["captions"] == (CAPTIONS[1], "second")
    with pytest.raises(UserError, match=r"'image' .*\(binary\)"):
        open_source(SourceConfig(path=str(tmp_path)))


def test_more_parquet_files_than_can_be_open_at_one_time(tmp_path, images):
    write_parquet(tmp_path, images)
    (shard, *others) = sorted(tmp_path.glob("*.parquet"))
    count = 200
    for n in range(len(others), count):
        (tmp_path / f"train-{n:05}.parquet").write_bytes(shard.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    already_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (already_open + count // 2, limits[1]))
    try:
        source = open_source(SourceConfig(path=str(tmp_path)))
        keys = {source[i]["key"] for i in range(len(source))}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(keys) == len(source) >= count


@pytest.mark.parametrize("path", ["http://a.b/c", "s3://", "s3://me@/b", "ftp://a/b"])
def test_other_addresses_are_refused(path):
    with pytest.raises(UserError, match="s3://BUCKET/PATH"):
        open_source(SourceConfig(path=path))
