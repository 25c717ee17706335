"""Damaged files, lines and rows of every format."""

import bz2
import gzip
import lzma
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError, usable_label
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from tests.data.formats import CAPTIONS, N, make_datasets, write_parquet, write_records
from tests.data.test_delimited import LFS_POINTER


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"filepath,title\na.png,a\n", r"'image'.*'filepath', 'title'"),
        ("a.tsv", b"a caption\tmissing.png\n", r"'image'"),
        ("a.csv", b"image,caption\n", r"a\.csv"),
        ("a.csv", b'image,caption\na.png,"a', r"a\.csv .*byte \d+"),
        ("a.csv", b"\xff,caption\na,b\n", r"a\.csv .*UTF-8"),
        ("a.csv", b"", r"a\.csv"),
        ("a.parquet", b"PAR1", r"a\.parquet"),
        ("captions_x.json", b"{}", r"captions_x\.json .*annotations"),
        ("dataset_x.json", b"[", r"dataset_x\.json"),
        ("x.token", b"no tab", r"x\.token"),
        ("x.token", b"missing.jpg#0\ta", r"'missing\.jpg' .*x\.token"),
        ("records.json", b"{", r"\(.*Expecting"),
        ("state.json", b"{}", r"\("),
        ("state.json", b'{"_data_files": [{"filename": 5}]}', "damaged"),
        ("state.json", b'{"_data_files": [{"filename": null}]}', "damaged"),
        *(
            (f"a.{kind}", LFS_POINTER, "git lfs pull")
            for kind in ("csv", "tar", "parquet", "jsonl")
        ),
        ("a.tar", gzip.compress(b"a tar", mtime=0), r"a\.tar .*gzip"),
        ("a.csv", bz2.compress(b"image,caption\n"), r"a\.csv .*bzip2"),
        ("a.jsonl", lzma.compress(b"{}"), r"a\.jsonl .*xz"),
        ("a.parquet", b"PK\x03\x04", r"a\.parquet .*zip"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(SourceConfig(path=str(tmp_path)))


def test_bad_lines_of_a_table_are_bad_samples(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image,caption\na.png\na.png,\xff\n,a\na.png,fine\n")
    source, kinds = open_source(SourceConfig(path=str(tmp_path))), []
    for i in range(3):
        with pytest.raises(BadSampleError) as raised:
            source[i]
        kinds.append(raised.value.kind)
    assert kinds == ["no_example", "not_utf8", "missing"]
    assert source[3]["captions"] == ("fine",)


def test_a_damaged_row_group_makes_bad_samples(tmp_path, images):
    write_parquet(tmp_path, images)
    file = tmp_path / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    source = open_source(SourceConfig(path=str(tmp_path)))
    with pytest.raises(BadSampleError) as raised:
        source[0]
    assert raised.value.kind == "damaged"
    assert source[N - 1]["captions"] == (CAPTIONS[N - 1],)


def test_labels_out_of_range_are_bad_samples(tmp_path, images):
    table = make_datasets(images).data.table
    about = table.schema.metadata
    labels = pa.array([0, 1, -1, 7, 0, 0, 0], pa.int64())
    table = table.set_column(table.schema.get_field_index("label"), "label", labels)
    parquet.write_table(
        table.replace_schema_metadata(about),
        tmp_path / "a.parquet",
    )
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert [source[i]["label"] for i in range(3)] == ["cat", "犬", None]
    assert source[3]["captions"] == (CAPTIONS[3],)  # good for all that does without labels
    with pytest.raises(BadSampleError, match=r'"label" .*7, .*2'):
        usable_label(source[3])


def test_a_missing_shard_of_records_is_refused(tmp_path, images):
    write_records(tmp_path, images)
    os.truncate(tmp_path / "1.array_record", 0)
    with pytest.raises(UserError, match=r"1\.array_record"):
        open_source(SourceConfig(path=str(tmp_path)))
