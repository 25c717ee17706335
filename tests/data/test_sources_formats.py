"""Every format, written by the tools that people use for it."""

import bz2
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import resource
import tarfile
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from grain._src.python.testing.experimental import assert_equal_output_after_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pyarrow.fs import GcsFileSystem

from lit_jax.config import DataConfig, SourceConfig
from lit_jax.data import files
from lit_jax.data.example import BadSampleError, Example, usable_label
from lit_jax.data.files import ObjectPath, line_offsets, locate
from lit_jax.data.image import decode
from lit_jax.data.listing import expand
from lit_jax.data.loader import ImagePreprocessor, PairPreprocessor, TextPreprocessor, TrainStream
from lit_jax.data.sources import open_source, records, tar_index
from lit_jax.data.sources.index_cache import TableCache
from lit_jax.data.sources.tar_index import open_index
from lit_jax.errors import UserError
from tests.object_store.served import BUCKET, serve

CAPTIONS = (
    "ein Hund läuft",
    "犬が走る",
    "كلب يجري",
    "कुत्ता दौड़ता है",
    "un cafe\u0301",
    "👩‍👧 and a dog",
    'a "quoted", tall\tdog',
)
N = len(CAPTIONS)
CLASSES = ("cat", "犬")


def flat(caption: str) -> str:
    """What a format without quoting can hold."""
    return caption.replace("\t", " ")


@pytest.fixture(scope="session")
def images(noise, encode) -> list[bytes]:
    return [encode(noise(4, 7, 3, seed=i)) for i in range(N)]


def add(tar: tarfile.TarFile, name: str, content: bytes, **about) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_files(folder: Path, images) -> None:
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(image)


def write_tars(folder: Path, images) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * 4, min(shard * 4 + 4, N)):
                about = {"caption": CAPTIONS[i], "key": f"{i:09}", "status": "success"}
                add(tar, f"{i:09}.jpg", images[i])
                add(tar, f"{i:09}.json", json.dumps(about).encode())
                add(tar, f"{i:09}.txt", CAPTIONS[i].encode())
                add(tar, f"{i:09}.cls", str(i % 2).encode())
        # img2dataset leaves these beside each tar.
        parquet.write_table(pa.table({"key": ["a"]}), folder / f"{shard:05}.parquet")
        (folder / f"{shard:05}_stats.json").write_text("{}")


def write_jsonl(folder: Path, images) -> None:
    write_files(folder, images)
    rows = [{"image": f"{i}.png", "caption": CAPTIONS[i], "label": i % 2} for i in range(N)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder: Path, images) -> None:
    write_files(folder, images)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "label"])
        writer.writerows([f"{i}.png", CAPTIONS[i], i % 2] for i in range(N))


def write_tsv(folder: Path, images) -> None:
    """As Conceptual Captions: no names of columns."""
    write_files(folder, images)
    lines = "".join(f"{flat(CAPTIONS[i])}\t{i}.png\n" for i in range(N))
    (folder / "train.tsv").write_text(lines, encoding="utf-8")


def write_parquet(folder: Path, images) -> None:
    for shard, rows in enumerate((range(4), range(4, N))):
        table = pa.table(
            {
                "image": [{"bytes": images[i], "path": None} for i in rows],
                "caption": [CAPTIONS[i] for i in rows],
                "label": [i % 2 for i in rows],
                "unused": [0] * len(rows),
            }
        )
        parquet.write_table(table, folder / f"train-{shard:05}.parquet", row_group_size=2)


def make_datasets(images) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=list(CLASSES)),
    )
    rows = {
        "image": [{"bytes": image, "path": None} for image in images],
        "caption": list(CAPTIONS),
        "label": [i % 2 for i in range(N)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_datasets(folder: Path, images) -> None:
    make_datasets(images).save_to_disk(folder, num_shards=2)


def write_records(folder: Path, images) -> None:
    shards = []
    for shard, rows in enumerate((range(4), range(4, N))):
        shards.append(records.Shard(f"{shard}.array_record", len(rows)))
        writer = ArrayRecordWriter(str(folder / shards[-1].name), records.WRITER_OPTIONS)
        for i in rows:
            example = Example(
                key=str(i), image=images[i], captions=(CAPTIONS[i],), label=str(i % 2)
            )
            writer.write(records.encode(example))
        writer.close()
    records.write_manifest(folder, shards)


def write_coco(folder: Path, images) -> None:
    for name in ("annotations", "val2017"):
        (folder / name).mkdir()
    write_files(folder / "val2017", images)
    content = {
        "images": [{"id": 100 + i, "file_name": f"{i}.png"} for i in range(N)],
        "annotations": [
            {"id": i, "image_id": 100 + i, "caption": CAPTIONS[i]} for i in reversed(range(N))
        ],
    }
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(content))
    (folder / "annotations/instances_val2017.json").write_text("{}")


def write_karpathy(folder: Path, images) -> None:
    (folder / "flickr30k-images").mkdir()
    write_files(folder / "flickr30k-images", images)
    rows = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": CAPTIONS[i]}]}
        for i in range(N)
    ]
    other = {"filename": "x.png", "split": "train", "sentences": []}
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": [other, *rows]}))


def write_flickr(folder: Path, images) -> None:
    write_files(folder, images)
    lines = "".join(f"{i}.png#0\t{flat(CAPTIONS[i])}\n" for i in range(N))
    (folder / "results_20130124.token").write_text(lines, encoding="utf-8")


def write_classes(folder: Path, images) -> None:
    for i, image in enumerate(images):
        (folder / "val" / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "val" / CLASSES[i % 2] / f"{i}.PNG").write_bytes(image)
    (folder / "val/readme.txt").write_text("no image")


NAMES, IDS = tuple(CLASSES[i % 2] for i in range(N)), tuple(str(i % 2) for i in range(N))
NONE = (None,) * N
FLAT = tuple(map(flat, CAPTIONS))
# name -> (what writes it, split, captions, labels)
FORMATS = {
    "tars": (write_tars, None, CAPTIONS, IDS),
    "jsonl": (write_jsonl, None, CAPTIONS, IDS),
    "csv": (write_csv, None, CAPTIONS, IDS),
    "tsv": (write_tsv, None, FLAT, NONE),
    "parquet": (write_parquet, "train", CAPTIONS, IDS),
    "datasets": (write_datasets, None, CAPTIONS, NAMES),
    "records": (write_records, None, CAPTIONS, IDS),
    "coco": (write_coco, "val2017", CAPTIONS, NONE),
    "karpathy": (write_karpathy, "test", CAPTIONS, NONE),
    "flickr": (write_flickr, None, FLAT, NONE),
    "classes": (write_classes, "val", None, NAMES),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory, images) -> Path:
    root = tmp_path_factory.mktemp("formats")
    for name, (write, *_) in FORMATS.items():
        (root / name).mkdir()
        write(root / name, images)
    return root


@pytest.fixture(scope="session")
def served(data):
    with serve(data) as address:
        yield address


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
            "Could not connect",
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


@pytest.fixture
def open_stream(data, image_transform, tokenizer):
    def open_stream(name, *, process=0, processes=1, **config):
        config = DataConfig(threads=2, **config)
        return TrainStream(
            open_source(SourceConfig(path=str(data / name), split=FORMATS[name][1])),
            PairPreprocessor(ImagePreprocessor(image_transform), TextPreprocessor(tokenizer)),
            config=config,
            seed=0,
            batch_size=4,
            process_index=process,
            process_count=processes,
        )

    return open_stream


class Limited:
    """The first batches of a stream, as Grain's checker takes them: an iterator with a state."""

    def __init__(self, stream, batches=5):
        self._stream, self._batches = stream, batches

    def __iter__(self):
        return self

    def __next__(self):
        if self.get_state()["next_batch"] == self._batches:
            raise StopIteration
        return next(self._stream)

    def get_state(self):
        return self._stream.get_state()

    def set_state(self, state):
        self._stream.set_state(state)


CAPTIONED = [name for name in FORMATS if name != "classes"]


@pytest.mark.parametrize("name", CAPTIONED)
def test_every_source_goes_on_from_every_position(open_stream, name):
    stream = open_stream(name)
    assert_equal_output_after_checkpoint(Limited(stream))
    stream.close()


@pytest.mark.parametrize("name", CAPTIONED)
def test_two_processes_share_every_source(open_stream, name):
    streams = [open_stream(name, process=p, processes=2) for p in range(2)]
    whole = open_stream(name)
    for _ in range(4):
        expected, *shares = (next(stream) for stream in (whole, *streams))
        for key, array in expected.items():
            for p, share in enumerate(shares):
                np.testing.assert_array_equal(share[key], array[p::2])
    for stream in (whole, *streams):
        stream.close()


@pytest.mark.long
@pytest.mark.parametrize("name", CAPTIONED)
def test_workers_do_not_change_the_order_of_any_source(open_stream, name):
    streams = [open_stream(name, workers=workers) for workers in (0, 1, 2)]
    batches = [[next(stream) for _ in range(4)] for stream in streams]
    for stream in streams:
        stream.close()
    for others in batches[1:]:
        for batch, other in zip(batches[0], others, strict=True):
            for key in batch:
                np.testing.assert_array_equal(batch[key], other[key])


# Tar files.


def open_tars(folder: Path, **config):
    return open_source(SourceConfig(path=str(folder), **config))


def test_braces_are_expanded():
    assert expand("s/{00009..00011}.tar") == ["s/00009.tar", "s/00010.tar", "s/00011.tar"]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand("plain.tar") == ["plain.tar"]


def test_braces_name_tar_files(data):
    assert len(open_tars(data / "tars/{00000..00001}.tar")) == N
    assert len(open_tars(data / "tars/{00001,00000}.tar")) == N
    assert len(open_tars(data / "tars/00000.tar")) == 4
    with pytest.raises(UserError, match=r"00002\.tar"):
        open_tars(data / "tars/{00000..00002}.tar")


def test_the_index_is_made_once_and_again_when_a_file_changes(tmp_path, images, monkeypatch):
    write_tars(tmp_path, images)
    scanned, scan = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda n, file: scanned.append(n) or scan(n, file))
    assert len(open_tars(tmp_path)) == len(open_tars(tmp_path)) == N
    assert sorted(scanned) == [0, 1]
    with tarfile.open(tmp_path / "00001.tar", "a") as tar:
        add(tar, "new.png", images[0])
        add(tar, "new.txt", b"new")
    assert open_tars(tmp_path)[N]["captions"] == ("new",)
    (index,) = tmp_path.glob("lit_jax-index-*.arrow")
    index.write_bytes(index.read_bytes()[:100])  # a damaged index is no harm
    assert len(open_tars(tmp_path)) == N + 1


def test_the_index_goes_to_the_cache_where_nothing_can_be_written(tmp_path, images, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    write_tars(folder, images)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    files = [folder / f"{n:05}.tar" for n in range(2)]
    beside, _ = TableCache(files, [tar_index.VERSION], kind="index").places
    beside.mkdir()  # root may write everywhere, but not a file where a folder is
    assert len(open_index(files)) == N
    assert len(list((cache / "lit_jax").glob("*.arrow"))) == 1
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(files[0]))
    with pytest.raises(UserError, match=r"XDG_CACHE_HOME"):
        open_index(files)


@pytest.mark.parametrize("name", ["../../etc/passwd.png", "/etc/passwd.png", "a/../b.png", "link"])
def test_hostile_members_are_bad_samples(tmp_path, images, name):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        if name == "link":
            add(tar, "x.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        else:
            add(tar, name, images[0])
        add(tar, "good.png", images[1])
        add(tar, "good.txt", b"good")
    source = open_tars(tmp_path)
    with pytest.raises(BadSampleError, match="link") as raised:
        source[0]
    assert raised.value.kind == "hostile_path"
    assert source[1]["captions"] == ("good",)


def test_bad_members_are_bad_samples_of_their_kind(tmp_path, images):
    members = {
        "a.txt": "é".encode("latin-1"),
        "a.png": images[0],
        "b.json": b"{",
        "b.png": images[0],
        "c.json": b"[]",
        "c.png": images[0],
        "d.txt": b"no image",
        "e.png": b"",
        "e.txt": b"e",
        "f.png": images[0][:60],
        "f.txt": b"f",
        "g.png": b"<html>",
        "g.txt": b"g",
    }
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    source, kinds = open_tars(tmp_path), []
    for i in range(len(source)):
        with pytest.raises(BadSampleError) as raised:
            decode(source[i]["image"])
        kinds.append(raised.value.kind)
    assert kinds == [
        "not_utf8",
        "no_example",
        "no_example",
        "missing",
        "empty",
        "damaged",
        "not_image",
    ]


def test_names_that_are_not_utf8_name_images(tmp_path, images):
    with tarfile.open(
        tmp_path / "0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        add(tar, "é.png", images[0])
        add(tar, "é.txt", b"coffee")
    example = open_tars(tmp_path / "0.tar")[0]
    assert (example["key"], example["captions"]) == (r"0.tar/\xe9", ("coffee",))

    folder = os.fsencode(tmp_path / "classes") + b"/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(images[0])
    source = open_source(SourceConfig(path=str(tmp_path / "classes")))
    example = pickle.loads(pickle.dumps(source))[0]
    assert (example["key"], example["label"]) == (r"caf\xe9/\xff.png", r"caf\xe9")
    assert decode(example["image"]).size == (7, 4)


def test_a_truncated_tar_gives_what_is_left_of_it(tmp_path, images, caplog):
    write_tars(tmp_path, images)
    file = tmp_path / "00001.tar"
    with tarfile.open(file) as tar:
        cut = tar.getmember("000000005.jpg").offset_data + 10
    file.write_bytes(file.read_bytes()[:cut])
    source = open_tars(tmp_path)
    assert source[4]["captions"] == (CAPTIONS[4],)
    assert "00001.tar breaks off after" in caplog.text
    for i in range(5, len(source)):
        with pytest.raises(BadSampleError, match=r"000000005 .* end"):
            source[i]


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_an_unreadable_tar_is_refused(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar"):
        open_tars(tmp_path)


# Tables.

ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6), line_break=st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_back_any_text(tmp_path, texts, line_break):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=line_break, quoting=csv.QUOTE_ALL)
        writer.writerows([("image", "caption"), *(("a.png", text) for text in texts)])
    source = open_source(SourceConfig(path=str(tmp_path / "a.csv"), group_captions=False))
    assert [source[i]["captions"] for i in range(len(source))] == [(text,) for text in texts]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.text('a",\n', max_size=6), min_size=1, max_size=3), min_size=1),
    block_bytes=st.integers(1, 40),
)
def test_csv_lines_end_where_the_reader_of_csv_says(tmp_path, rows, block_bytes):
    def written(field: str) -> str:
        # Minimal: what neither begins with a quote nor has a comma or a line break stands as it is.
        plain = field and not field.startswith('"') and not {",", "\n"} & {*field}
        return field if plain else '"' + field.replace('"', '""') + '"'

    file = tmp_path / "a.csv"
    file.write_text("".join(",".join(map(written, row)) + "\n" for row in rows))
    offsets = line_offsets(file, quoted=True, block_bytes=block_bytes).tolist()
    content = file.read_text()
    lines = [content[a:b] for a, b in itertools.pairwise(offsets)]
    assert [next(csv.reader(io.StringIO(line, newline=""))) for line in lines] == rows


def test_csv_that_never_ends_a_field_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FIELD_BYTES", 1000)
    file = tmp_path / "a.csv"
    file.write_text('image,caption\na.png,5" nails\nb.png,"a\n' + "c.png,c\n" * 1000)
    with pytest.raises(UserError, match=r"a\.csv .*35;"):
        line_offsets(file, quoted=True, block_bytes=64)
    file.write_text('image,caption\na.png,"a' + "\n" * 999 + '"\n')
    assert len(line_offsets(file, quoted=True, block_bytes=64)) == 3


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_tsv_keeps_quotes_that_quote_nothing(tmp_path):
    lines = ['5" nails', '"a" and "b"', '"said ""no"""', '"', "'"]
    text = "".join(f"{i}.png\t{line}\n" for i, line in enumerate(lines))
    (tmp_path / "a.tsv").write_text("image\tcaption\n" + text)
    source = open_source(SourceConfig(path=str(tmp_path)))
    got = [source[i]["captions"][0] for i in range(len(source))]
    assert got == ['5" nails', '"a" and "b"', 'said "no"', '"', "'"]


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


def test_columns_are_named_by_the_config(tmp_path, images):
    table = pa.table({"jpg": images, "text": [[c, "second"] for c in CAPTIONS]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(SourceConfig(path=str(tmp_path), image_key="jpg", caption_key="text"))
    assert source[1]["captions"] == (CAPTIONS[1], "second")
    with pytest.raises(UserError, match=r"'image' .*\(binary\)"):
        open_source(SourceConfig(path=str(tmp_path)))


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


def test_a_missing_shard_of_records_is_refused(tmp_path, images):
    write_records(tmp_path, images)
    os.truncate(tmp_path / "1.array_record", 0)
    with pytest.raises(UserError, match=r"1\.array_record"):
        open_source(SourceConfig(path=str(tmp_path)))


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


@pytest.mark.parametrize("path", ["http://a.b/c", "s3://", "s3://me@/b", "ftp://a/b"])
def test_other_addresses_are_refused(path):
    with pytest.raises(UserError, match="s3://BUCKET/PATH"):
        open_source(SourceConfig(path=path))
