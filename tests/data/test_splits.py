"""Splits: of saved data sets, of lists, and in the names of files."""

import dataclasses

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from tests.data.formats import CAPTIONS, N, make_datasets, write_csv
from tests.object_store.served import BUCKET, serve


def test_a_saved_dict_of_data_sets_has_splits(tmp_path, images):
    whole = make_datasets(images)
    datasets.DatasetDict(train=whole, test=whole.select([2, 0])).save_to_disk(tmp_path)
    source = open_source(SourceConfig(path=str(tmp_path), split="test"))
    assert [source[i]["captions"] for i in range(2)] == [(CAPTIONS[2],), (CAPTIONS[0],)]
    with pytest.raises(UserError, match=r"'valid'; .*test, train"):
        open_source(SourceConfig(path=str(tmp_path), split="valid"))
    # Folders beside the splits are not entered: this link leads back to the data set.
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(open_source(SourceConfig(path=str(tmp_path), split="test"))) == 2
    for split in ("train", "test"):
        (tmp_path / split / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json, .*dataset_dict\.json"):
        open_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("store", ["s3://nobody:none", "gs://anonymous"])
def test_a_saved_dict_of_data_sets_is_read_from_an_object_store(
    tmp_path, images, store, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = make_datasets(images)
    datasets.DatasetDict(train=whole, test=whole.select([2, 0])).save_to_disk(tmp_path / "served")
    with serve(tmp_path / "served") as address:
        config = SourceConfig(path=address(f"{store}@{BUCKET}"), split="test")
        source = open_source(config)
        assert [source[i]["captions"] for i in range(2)] == [(CAPTIONS[2],), (CAPTIONS[0],)]
        assert [file.parent.parent.name for file in (tmp_path / "cache").rglob("*.arrow")] == [
            "test"
        ]
        with pytest.raises(UserError, match=r"'valid'; .*test, train"):
            open_source(dataclasses.replace(config, split="valid"))


def test_splits_of_karpathy_are_listed(data):
    with pytest.raises(UserError, match=r"'x'; .*test, train"):
        open_source(SourceConfig(path=str(data / "karpathy"), split="x"))


def test_several_files_need_a_choice(tmp_path, images):
    write_csv(tmp_path, images)
    (tmp_path / "test-pairs.csv").write_bytes((tmp_path / "pairs.csv").read_bytes())
    assert len(open_source(SourceConfig(path=str(tmp_path), split="test"))) == N
    with pytest.raises(UserError, match=r"pairs\.csv, test-pairs\.csv"):
        open_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train-00000.parquet", "train-00001.parquet"]),
        ("train_extra", ["train_extra-00000.parquet"]),
        ("extra", ["train_extra-00000.parquet"]),
        ("test.v2", ["test.v2.parquet"]),
        ("val", ["coco-val.parquet"]),
        ("clean", ["val-clean-small.parquet"]),
        ("rain", []),
    ],
)
def test_a_split_is_a_whole_part_of_the_names(tmp_path, split, names):
    for name in (
        "train-00000.parquet",
        "train-00001.parquet",
        "train_extra-00000.parquet",
        "more-train-00000.parquet",
        "test.v2.parquet",
        "coco-val.parquet",
        "val-clean-small.parquet",
    ):
        table = pa.table({"image": [b""], "caption": [name]})
        parquet.write_table(table, tmp_path / name)
    config = SourceConfig(path=str(tmp_path), split=split)
    if names:
        source = open_source(config)
        assert [source[i]["captions"] for i in range(len(source))] == [(name,) for name in names]
    else:
        with pytest.raises(UserError, match=rf"'{split}'"):
            open_source(config)
