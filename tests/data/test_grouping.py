"""Tables with a row for each caption, as the field writes them: the rows of one image are one example."""

import csv
import json
import pickle
import re
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet

from lit_jax.config import DataConfig, SourceConfig
from lit_jax.data.convert import main as convert
from lit_jax.data.example import BadSampleError, Source
from lit_jax.data.image import decode
from lit_jax.data.mixture import open_training_data
from lit_jax.data.sources import grouping, open_source
from lit_jax.data.sources.grouping import Groups
from lit_jax.data.sources.rows import _real, resolve

# Two images, whose rows do not stand together; the first is written in four ways.
ROWS = (
    ("a.png", "a dog"),
    ("sub/b.png", "a cat"),
    ("./a.png", "one dog"),
    ("sub/../a.png", "a dog"),
    ("sub//b.png", "one cat"),
    ("{folder}/a.png", "the dog"),
)
GROUPED = [("a dog", "one dog", "a dog", "the dog"), ("a cat", "one cat")]


def write_csv(folder: Path, rows) -> None:
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


def write_tsv(folder: Path, rows) -> None:
    lines = "".join(f"{image}\t{caption}\n" for image, caption in rows)
    (folder / "pairs.tsv").write_text("image\tcaption\n" + lines)


def write_jsonl(folder: Path, rows) -> None:
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def write_parquet(folder: Path, rows) -> None:
    """Of two files, each with groups of two rows."""
    table = pa.table(dict(zip(("image", "caption"), zip(*rows, strict=True), strict=True)))
    parquet.write_table(table[:3], folder / "0.parquet", row_group_size=2)
    parquet.write_table(table[3:], folder / "1.parquet", row_group_size=2)


def write_paths_of_datasets(folder: Path, rows) -> None:
    images, captions = zip(*rows, strict=True)
    table = pa.table({"image": [{"path": i, "bytes": None} for i in images], "caption": captions})
    datasets.Dataset(table).save_to_disk(folder)


WRITERS = (write_csv, write_tsv, write_jsonl, write_parquet, write_paths_of_datasets)


@pytest.fixture(params=WRITERS, ids=lambda write: write.__name__[6:])
def folder(request, tmp_path, noise, encode) -> Path:
    (tmp_path / "sub").mkdir()
    for seed, name in enumerate(("a.png", "sub/b.png")):
        (tmp_path / name).write_bytes(encode(noise(4, 7, 3, seed=seed)))
    request.param(tmp_path, [(i.replace("{folder}", str(tmp_path)), c) for i, c in ROWS])
    return tmp_path


def captions_of(source: Source) -> list[tuple[str, ...]]:
    return [source[i]["captions"] for i in range(len(source))]


def test_rows_of_one_file_are_one_example(folder, caplog):
    caplog.set_level("INFO")
    source = open_source(SourceConfig(path=str(folder)))
    assert captions_of(source) == captions_of(pickle.loads(pickle.dumps(source))) == GROUPED
    assert [decode(source[i]["image"]).size for i in range(2)] == [(7, 4)] * 2
    assert len(re.findall(r": 6 .*\b2 .*group_captions=False", caplog.text)) == 1
    assert captions_of(open_source(SourceConfig(path=str(folder), max_examples=1))) == GROUPED[:1]


@pytest.mark.parametrize("write", [write_csv, write_tsv, write_jsonl, write_parquet])
def test_links_name_the_file_that_they_lead_to(tmp_path, write):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    (tmp_path / "by_folder").symlink_to("images")
    (tmp_path / "by_file.png").symlink_to(tmp_path / "by_folder" / "a.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    names = ("images/a.png", "by_folder/a.png", "by_file.png", "./by_file.png", "nowhere.png")
    write(tmp_path, [(name, name) for name in names])
    assert captions_of(open_source(SourceConfig(path=str(tmp_path)))) == [names[:4], names[4:]]


@pytest.mark.parametrize("there", ["NFC", "NFD"])
def test_both_normal_forms_of_a_name_are_one_file_unless_both_are_there(tmp_path, there):
    one, two = (unicodedata.normalize(form, "Café/é.png") for form in ("NFC", "NFD"))
    here = unicodedata.normalize(there, "Café/é.png")
    (tmp_path / here).parent.mkdir()
    (tmp_path / here).touch()
    write_csv(tmp_path, [(one, "a"), (two, "b"), (here, "c")])
    assert captions_of(open_source(SourceConfig(path=str(tmp_path)))) == [("a", "b", "c")]
    (tmp_path / here).with_name(({one, two} - {here}).pop().rpartition("/")[2]).touch()
    _real.cache_clear()
    assert len(open_source(SourceConfig(path=str(tmp_path)))) == 2


def test_a_file_in_the_root_is_another_than_one_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("/a.png", tmp_path) == "//a.png"
    assert resolve("a.png", tmp_path) == f"{tmp_path.resolve()}/a.png"


def test_a_key_keeps_each_row_an_example(folder):
    single = [(caption,) for _, caption in ROWS]
    config = SourceConfig(path=str(folder), group_captions=False)
    assert captions_of(open_source(config)) == single
    assert captions_of(open_source(SourceConfig(path=str(folder)), text_only=True)) == single
    assert len(open_training_data(DataConfig(train=config))) == 6
    parts = {"a": config, "b": SourceConfig(path=str(folder))}
    assert len(open_training_data(DataConfig(mixture=parts))) == 8


def test_converted_rows_are_grouped_rows(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted")
    flags = (f"--source.path={folder}", "--workers=1")
    assert convert([*flags, f"--output={output / 'a'}"]) == 0
    assert captions_of(open_source(SourceConfig(path=str(output / "a")))) == GROUPED
    assert convert([*flags, f"--output={output / 'b'}", "--source.group_captions=False"]) == 0
    assert len(open_source(SourceConfig(path=str(output / "b")))) == 6


def test_what_took_long_is_kept_and_found_again(folder, monkeypatch):
    monkeypatch.setattr(grouping, "CACHE_FROM_SECONDS", 0)
    config = SourceConfig(path=str(folder))
    assert captions_of(open_source(config)) == GROUPED
    with monkeypatch.context() as patch:
        patch.setattr(grouping, "_pass_over", lambda *_, **__: pytest.fail("a second pass"))
        source = open_source(config)
    copy = pickle.loads(pickle.dumps(source))
    assert captions_of(copy) == captions_of(source) == GROUPED
    (groups,) = folder.glob("lit_jax-groups-*.arrow")
    groups.write_bytes(groups.read_bytes()[:100])
    assert captions_of(open_source(config)) == GROUPED


def test_a_changed_file_is_passed_over_again(tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "CACHE_FROM_SECONDS", 0)
    config = SourceConfig(path=str(tmp_path))
    for count in (2, 3):
        write_jsonl(tmp_path, [("a.png", f"{i}") for i in range(count)])
        assert captions_of(open_source(config)) == [tuple(map(str, range(count)))]


def test_rows_with_other_labels_stay_apart_where_labels_count(tmp_path):
    rows = [("a.png", "x", 1), ("b.png", "y", 1), ("a.png", "z", 2), ("a.png", "w", 1.0)]
    lines = [json.dumps(dict(zip(("image", "caption", "label"), r, strict=True))) for r in rows]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    config = SourceConfig(path=str(tmp_path))
    apart = open_source(config)
    assert captions_of(apart) == [("x", "w"), ("y",), ("z",)]
    assert [apart[i]["label"] for i in range(3)] == ["1", "1", "2"]
    together = [("x", "z", "w"), ("y",)]
    assert captions_of(open_source(config, labelled=False)) == together
    assert captions_of(open_training_data(DataConfig(train=config))) == together
    templates = SourceConfig(path=str(tmp_path), templates=("a {}",))
    assert len(open_training_data(DataConfig(train=templates))) == 3


def test_bad_rows_stand_alone(tmp_path):
    lines = [
        '{"image": "a.png", "cap',
        '{"image": "a.png", "caption": "x"}',
        '{"image": "a.png", "caption": 7}',
        '{"image": "a.png", "caption": "y"}',
        '{"caption": "no image"}',
        '{"image": "http://a/a.png"}',
        '{"image": "http://a/a.png"}',
        "[" * 100_000,
        '{"image": "a.png", "caption": "z"}',
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert len(source) == 7
    assert source[1]["captions"] == ("x", "y", "z")
    for index in (0, 2, 3, 4, 5, 6):
        with pytest.raises(BadSampleError, match="the line at byte"):
            source[index]


def test_equal_keys_alone_are_different_examples(tmp_path):
    rows = [{"image": f"{i}.png", "caption": "x", "key": "same"} for i in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(open_source(SourceConfig(path=str(tmp_path)))) == 3


def test_captions_by_language_come_together(tmp_path):
    rows = [{"en": ["a dog"], "de": "ein Hund"}, {"de": ["Hund"]}, {"en": ["one dog"]}]
    lines = [json.dumps({"image": "a.png", "captions": captions}) for captions in rows]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (example,) = (open_source(SourceConfig(path=str(tmp_path)))[i] for i in range(1))
    assert example["captions"] == ("a dog", "ein Hund", "Hund", "one dog")
    assert example.get("languages") == ("en", "de", "de", "en")
    german = open_source(SourceConfig(path=str(tmp_path), languages={"de": 1.0}))
    assert captions_of(german) == [("ein Hund", "Hund")]
    (tmp_path / "captions.jsonl").write_text(lines[0] + '\n{"image": "a.png", "caption": "x"}')
    with pytest.raises(BadSampleError, match=r"a\.png"):
        open_source(SourceConfig(path=str(tmp_path)))[0]


def embedded(images) -> dict[str, list]:
    """As `datasets` embeds folders of classes: the last part of each path, which two images share."""
    first, second = images
    names = ("001.jpg", "001.jpg", "001.jpg", "002.jpg", None, None)
    contents = (first, second, first, first, first, first)
    pairs = zip(names, contents, strict=True)
    return {
        "image": [{"bytes": content, "path": name} for name, content in pairs],
        "caption": list("abcdef"),
    }


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_embedded_images_are_one_if_path_and_content_are(tmp_path, noise, encode, kind):
    table = pa.table(embedded([encode(noise(4, 7, 3, seed=seed)) for seed in range(2)]))
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    else:
        datasets.Dataset(table).save_to_disk(tmp_path, num_shards=2)
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert captions_of(source) == [("a", "c"), ("b",), ("d",), ("e",), ("f",)]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_contents_are_read_only_where_a_path_repeats(tmp_path, monkeypatch, kind):
    rows = [{"bytes": b"x", "path": f"{i % 11}.jpg"} for i in range(12)]
    table = pa.table({"image": rows, "caption": ["x"] * 12})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    else:
        datasets.Dataset(table).save_to_disk(tmp_path)
    plain = open_source(SourceConfig(path=str(tmp_path), group_captions=False))
    read, contents = [], type(plain).contents

    def counted(self, rows):
        for row, content in contents(self, rows):
            read.append(row)
            yield row, content

    monkeypatch.setattr(type(plain), "contents", counted)
    assert len(open_source(SourceConfig(path=str(tmp_path)))) == 11
    assert read == [0, 11]


@given(names=arrays(np.int64, st.integers(1, 40), elements=st.integers(-1, 8)))
def test_groups_are_those_of_a_dictionary(names):
    class Numbers:
        files = ()

        def __len__(self):
            return len(names)

        def __getitem__(self, index):
            raise NotImplementedError

        def rows(self):
            yield from ()

        def identities(self, *, by_label):
            for part in np.array_split(names, 3):
                yield [None if name < 0 else str(name) for name in part.tolist()]

        def contents(self, rows):
            return ()

    expected: dict[object, list[int]] = {}
    for row, name in enumerate(names.tolist()):
        expected.setdefault(("alone", row) if name < 0 else name, []).append(row)
    groups = Groups(grouping._pass_over(Numbers(), by_label=False))
    found = [groups[i] for i in range(len(groups))]
    assert found == ([] if len(expected) == len(names) else list(expected.values()))
