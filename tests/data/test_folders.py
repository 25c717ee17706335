"""Folders as people have them: hidden ones, links, splits, and names with braces."""

import json
import logging
import os
import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.listing import expand, is_system
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from tests.object_store.served import BUCKET, serve

HIDDEN = (
    ".ipynb_checkpoints/0.jpg",
    "__MACOSX/cat/._0.jpg",
    ".git/x.png",
    "@eaDir/0.jpg",
    "#recycle/old/0.jpg",
    "lost+found/0.jpg",
    "$RECYCLE.BIN/0.png",
    "dog/.ipynb_checkpoints/0.jpg",
    "dog/._0.jpg",
    "dog/.DS_Store",
    "dog/Thumbs.db",
    "dog/@eaDir/0.jpg@SynoEAStream/0.jpg",
)


@pytest.fixture
def make(tmp_path, noise, encode):
    """Makes files of these names, all of them the same picture."""
    image = encode(noise(4, 7, 3))

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(image)
        return tmp_path

    return make


def labels(path: object, split: str | None = None) -> list[str | None]:
    source = open_source(SourceConfig(path=str(path), split=split))
    return [source[i]["label"] for i in range(len(source))]


def test_hidden_and_system_folders_are_no_classes(make, caplog):
    caplog.set_level(logging.INFO)
    folder = make("cat/0.jpg", "dog/0.jpg", "dog/deep/1.jpg", *HIDDEN)
    assert labels(folder) == ["cat", "dog", "dog"]
    assert re.search(rf" {len(HIDDEN)} .*__MACOSX", caplog.text)


@pytest.mark.parametrize("name", ["._captions.jsonl", ".captions.jsonl.swp.jsonl", "._b.jsonl"])
def test_hidden_files_are_no_data(make, name, caplog):
    caplog.set_level(logging.INFO)
    folder = make("a.png")
    (folder / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a"}))
    (folder / name).write_bytes(b"\0\5\x16\7")
    assert len(open_source(SourceConfig(path=str(folder)))) == 1
    assert re.search(rf" 1 .* {folder} .*: {name}", caplog.text)
    (folder / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=rf"'{folder}'.*captions\.jsonl"):
        open_source(SourceConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./cat/0.jpg", False),
        ("../cat/0.jpg", False),
        ("cat/..hidden/0.jpg", True),
        ("a.b/0.jpg", False),
        ("THUMBS.DB", True),
        ("__macosx/0.jpg", True),
        ("lost", False),
    ],
)
def test_what_is_hidden_is_seen_by_its_name(path, expected):
    assert is_system(path) == expected


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/up", ".."), ("cat/up", "../.."), ("cat/self", "."), ("dog/deep/up", "../../cat/..")],
)
def test_a_link_to_a_parent_folder_is_refused_by_name(make, link, target):
    folder = make("cat/0.jpg", "dog/deep/0.jpg")
    (folder / link).symlink_to(target)
    with pytest.raises(UserError, match=rf"{link}"):
        labels(folder)


def test_links_that_lead_to_each_other_are_refused(make):
    folder = make("cat/0.jpg", "dog/0.jpg")
    (folder / "cat/other").symlink_to("../dog")
    (folder / "dog/other").symlink_to("../cat")
    with pytest.raises(UserError, match=r"/other "):
        labels(folder)


def test_links_to_folders_elsewhere_are_followed(make, tmp_path):
    make("elsewhere/0.jpg", "elsewhere/deep/1.jpg", "data/cat/0.jpg", "other/2.jpg")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/more").symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "data/gone").symlink_to(tmp_path / "nowhere")
    assert labels(tmp_path / "linked") == ["cat", "cat", "dog", "dog"]


def test_a_folder_that_is_reached_twice_is_told(make, caplog):
    folder = make("cat/0.jpg", "dog/0.jpg")
    (folder / "hound").symlink_to("dog")
    assert labels(folder) == ["cat", "dog", "hound"]
    assert "hound" in caplog.text


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "val"),
        ("Training", "Test"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("eval", "validation"),
        ("test_images", "train_images"),
        ("dev", "train", "validation"),
        ("train",),
    ],
)
def test_splits_are_no_classes(make, splits):
    folder = make(*(f"{split}/{name}/0.jpg" for split in splits for name in ("cat", "dog")))
    with pytest.raises(UserError, match=r"config\.data\.train\.split.*--split") as raised:
        labels(folder)
    assert ", ".join(sorted(splits)) in str(raised.value)
    assert labels(folder, splits[0]) == ["cat", "dog"]


def test_splits_beside_other_folders_are_no_classes(make):
    folder = make("train/cat/0.jpg", "val/cat/0.jpg", "sample/0.jpg")
    with pytest.raises(UserError, match=r"train, val"):
        labels(folder)


@pytest.mark.parametrize("classes", [("bus", "train"), ("testbild", "trainer"), ("train",)])
def test_classes_may_be_called_like_a_split(make, classes):
    assert labels(make(*(f"{name}/0.jpg" for name in classes))) == list(classes)


@pytest.mark.parametrize("name", ["0.tar", "0.parquet", "captions.jsonl"])
def test_folders_of_splits_with_other_data_are_listed(make, name):
    folder = make(f"train/{name}", f"test/{name}")
    with pytest.raises(UserError, match=r"test, train"):
        labels(folder)


@pytest.mark.parametrize("store", ["s3://nobody:none", "gs://anonymous"])
def test_splits_and_hidden_folders_of_an_object_store(make, store):
    names = ("train/cat/0.jpg", "train/__MACOSX/0.jpg", "val/cat/0.jpg", "tars/train/0.tar")
    with serve(make(*(f"all/{name}" for name in names))) as address:
        root = address(f"{store}@{BUCKET}/all")
        assert labels(root.replace("/all", "/all/train")) == ["cat"]
        assert labels(root, "val") == ["cat"]
        with pytest.raises(UserError, match=r"train, val"):
            labels(root)
        with pytest.raises(UserError, match=r"train"):
            labels(root.replace("/all", "/all/tars"))
        with pytest.raises(UserError, match=r"'dev'.*train, val\."):
            labels(root, "dev")


@pytest.mark.parametrize(
    ("names", "split", "known"),
    [
        (("captions_train2017.json", "captions_val2017.json"), "val", "train2017, val2017"),
        (("annotations/captions_val2014.json",), "val", "val2014"),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), "val", "train"),
        (("cc3m-train-0000.tar", "cc3m-validation-0000.tar"), "val", "train, validation"),
        (("train/0.jpg", "test.tsv"), "val", "test, train"),
    ],
)
def test_splits_in_the_names_of_files_are_listed(make, names, split, known):
    folder = make(*names)
    with pytest.raises(UserError, match=rf"'{split}'; .*{known}\."):
        labels(folder, split)


@pytest.mark.parametrize("names", [("photos.csv", "drawings.csv"), ("pairs.csv",)])
def test_names_that_are_typical_of_no_split_are_not_called_splits(make, names):
    there = ", ".join(sorted(name.removesuffix(".csv") for name in names))
    with pytest.raises(UserError, match=rf"'train'.*\(.*{there}\).*None"):
        labels(make(*names), "train")


def test_files_without_a_split_in_their_names_have_none(make):
    with pytest.raises(UserError, match=r"'val'"):
        labels(make("00000.tar", "00001.tar"), "val")


def test_folders_and_images_without_a_class_are_told(make, caplog):
    folder = make("cat/x.txt", "dog/0.heic")
    with pytest.raises(UserError, match=rf"'{folder}'.*captions\.jsonl"):
        labels(folder)
    assert re.search(r" 2 .*: cat, dog", caplog.text)
    folder = make("cat/0.jpg", "dog/0.jpg", "cover.jpg", "notes/readme.txt", "photos/0.heic")
    (folder / "empty").mkdir()
    assert labels(folder) == ["cat", "dog"]
    assert re.search(r" 3 .*\b5 .*: empty, notes, photos", caplog.text)
    assert re.search(r" 1 .*: cover\.jpg", caplog.text)


def test_files_that_are_no_images_are_told(make, caplog):
    folder = make("cat/0.jpg", "cat/1.heic", "cat/2.HEIC", "dog/0.jpg", "dog/1", "README.md")
    assert labels(folder) == ["cat", "dog"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"^4 .* 2 \.heic.* 1 \.md.*cat/1\.heic", told)


def test_a_list_above_the_folders_of_classes_is_no_lost_image(make, caplog):
    assert labels(make("cat/0.jpg", "classes.txt", "README.md")) == ["cat"]
    assert not caplog.text


def test_braces_are_those_of_a_shell(tmp_path, monkeypatch):
    for path in (
        "s/{00009..00011}.tar",
        "{a,b}{1..2}",
        "plain.tar",
        "a{,b}",
        "a{b,{c,d}}e",
        "{3..1}",
        "{1..9..4}",
        "{08..10}",
        "{-1..1}",
        "x{a{1..2},b}{y,z}",
    ):
        words = subprocess.run(["bash", "-c", f"echo {path}"], capture_output=True, check=True)
        assert expand(path) == words.stdout.decode().split(), path
    monkeypatch.chdir(tmp_path)
    Path("{a,b}.csv").touch()
    assert expand("{a,b}.csv") == ["{a,b}.csv"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0..99999999}.tar", "1,000,000"),
        ("{a,b}" * 20, "1,000,000"),
        ("{a,b}" * 21, r"\b20\b"),
        ("{" * 100_000, r"\b20\b"),
        ("{0..1", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("0..1}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("{x}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("{}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("{0..}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("{0.." + "9" * 5000 + "}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("{a,{b}", r"\{00000\.\.00331\}.*\{a,b\}"),
        ("s3://KEY:SECRET@bucket/{0..", r"\{00000\.\.00331\}.*\{a,b\}"),
    ],
    ids=range(12),
)
def test_braces_that_name_too_much_or_nothing_are_refused(path, message):
    with pytest.raises(UserError, match=message) as raised:
        open_source(SourceConfig(path=path))
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["captions.jsonl", "0.tar", "a.csv", "0.parquet", "captions_val.json", "a.json", "results.csv"],
)
def test_data_that_is_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}"):
            open_source(SourceConfig(path=str(path)))


def test_the_home_of_an_unknown_user_is_one_sentence():
    with pytest.raises(UserError, match=r"^~nobody-here/data"):
        open_source(SourceConfig(path="~nobody-here/data"))


def test_a_path_that_does_not_exist_is_told_so(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere'"):
        open_source(SourceConfig(path=str(tmp_path / "nowhere")))


def test_a_pattern_that_is_not_expanded_says_what_is(make):
    folder = make("00000/0.jpg", "00001/0.jpg", "a/0.tar")
    with pytest.raises(UserError, match=r"\*\.tar.*\{00000\.\.00331\}"):
        labels(f"{folder}/a/*.tar")
    with pytest.raises(UserError, match=rf"\{{00000\.\.00001\}}.* {folder}\."):
        labels(f"{folder}/{{00000..00001}}")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_of_several_splits_are_not_mixed(make, kind):
    """As a clone of a data set from the Hub has them."""
    names = [f"{part}-0000{n}-of-00002.{kind}" for part in ("train", "test") for n in (0, 1)]
    folder = make(*(f"data/{name}" for name in names))
    with pytest.raises(UserError, match=r"config\.data\.train\.split .*test, train\."):
        labels(folder / "data")
    for split in (None, "train"):
        with pytest.raises(UserError, match=rf"{folder}/data\."):
            labels(folder, split)
    # Each of these has the same split in its name, or is named one by one.
    for path in (
        make(*(f"one/{name}" for name in names[:2])) / "one",
        make(f"numbered/train0.{kind}", f"numbered/train1.{kind}") / "numbered",
        f"{folder}/data/{{{','.join(names)}}}",
    ):
        with pytest.raises(UserError) as raised:
            labels(path)
        assert "config.data.train.split" not in str(raised.value)


@pytest.mark.parametrize("split", [None, "test"])
def test_a_data_set_for_each_language_is_named_below_the_root(make, split):
    """CLIP_benchmark's multilingual data: a tree for each language, with folders for the splits."""
    folder = make("de/test/0.tar", "en/test/0.tar", "en/train/0.tar")
    with pytest.raises(UserError, match=rf"\bde, en\b.* {folder}/de\."):
        labels(folder, split)


def test_a_folder_whose_name_only_contains_the_split_is_not_offered_for_it(make):
    folder = make("latest/data.parquet", "other/data.parquet")
    with pytest.raises(UserError) as raised:
        labels(folder, "test")
    assert "'test'" in str(raised.value)
    assert f"{folder}/latest" not in str(raised.value)
    # A whole word of the name is the split.
    folder = make("words/in/dev-test.parquet") / "words"
    with pytest.raises(UserError, match=rf"{folder}/in\b"):
        labels(folder, "test")


def test_files_of_a_split_beside_files_of_none_are_told(make, caplog):
    row = pa.table({"image": ["a"], "caption": ["a"]})
    folder = make()
    for name in ("00000.parquet", "00001.parquet", "val-00000.parquet"):
        parquet.write_table(row, folder / name)
    assert len(open_source(SourceConfig(path=str(folder), group_captions=False))) == 3
    assert re.search(r"^.*1 of the 3 .*\(val\)", caplog.text)
    caplog.clear()
    assert len(open_source(SourceConfig(path=str(folder), split="val"))) == 1
    assert not caplog.text
