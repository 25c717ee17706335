"""Tables as programs write them: fields nobody asked for, other separators and encodings, damaged files."""

import base64
import json
import os
import re
import struct
import unicodedata
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.example import BadSampleError
from lit_jax.data.image import decode
from lit_jax.data.sources import grouping, open_source
from lit_jax.data.sources.checks import is_list
from lit_jax.errors import UserError


def open_folder(folder: Path, **config):
    return open_source(SourceConfig(path=str(folder), **config))


# Captions that are lists written as text.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['a dog', 'a cat']", True),
        ('["a dog", "a cat"]', True),
        ("('a', 'b')", True),
        ("['a dog' 'a cat']", True),
        ('{"en": "a dog"}', True),
        (' ["it\'s"] ', True),
        ("a dog", False),
        ("[a dog]", False),
        ("(a dog)", False),
        ("[]", False),
        ("[1, 2]", False),
        ("", False),
        ("[" * 5000 + "]" * 5000, False),
        (r"['\d", False),
        ("{}", False),
        ("('a')", False),
    ],
)
def test_a_list_written_as_text_is_seen(text, expected):
    assert is_list(text) is expected


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists_written_as_text_are_said_once_with_their_number(tmp_path, caplog, kind):
    texts = ['["a dog", "one dog"]', "a cat", "['a', 'b']"]
    rows = [{"image": f"{i}.png", "title": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        quoted = [text.replace('"', '""') for text in texts]
        lines = [f'{i}.png,"{text}"' for i, text in enumerate(quoted)]
        (tmp_path / "a.csv").write_text("\n".join(["image,title", *lines]))
    source = open_folder(tmp_path, caption_key="title")
    assert source[0]["captions"] == (texts[0],)
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"'title' .*2 .*3 ", said)


# Separators, encodings and names of columns.


@pytest.mark.parametrize(
    ("name", "line", "found", "expected"),
    [
        ("a.csv", "filepath;title", "';'", "a comma"),
        ("a.csv", "image;caption, in English", "';'", "a comma"),
        ("a.csv", "image\tcaption", "a tab", "a comma"),
        ("a.csv", '"image"|"caption"', "'|'", "a comma"),
        ("a.tsv", "image,caption", "a comma", "a tab"),
        ("a.tsv", "a,b", "a comma", "a tab"),
    ],
)
def test_another_separator_is_named(tmp_path, name, line, found, expected):
    (tmp_path / name).write_text(f"{line}\n{line}\n")
    with pytest.raises(UserError) as raised:
        open_folder(tmp_path)
    assert re.search(rf"{re.escape(found)}.*\*\.{name[-3:]} .*{expected}", str(raised.value))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "a dog, red\thttps://a.org/1.jpg\na cat\thttps://a.org/2.jpg\n"),  # CC3M
        ("a.tsv", "https://a.org/1.jpg\ta dog, red\n"),  # CC12M
        ("a.csv", "url,caption\nhttps://a.org/1.jpg,a dog\n"),
        ("a.csv", "image,caption\nhttps://a.org/1.jpg,a dog\nhttp://a.org/2.jpg,a cat\n"),
        ("captions.jsonl", '{"image": "https://a.org/1.jpg", "caption": "a dog"}\n'),
    ],
)
def test_lists_of_addresses_are_sent_to_img2dataset(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="img2dataset"):
        open_folder(tmp_path)


def test_parquet_of_addresses_is_sent_to_img2dataset(tmp_path):
    table = pa.table({"URL": ["https://a.org/1.jpg"], "TEXT": ["a dog"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for keys in ({}, {"image_key": "URL", "caption_key": "TEXT"}):
        with pytest.raises(UserError, match="img2dataset"):
            open_folder(tmp_path, **keys)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffimage,caption\na.png,a dog\n",
        " image , caption \na.png , a dog\n",
        '"image","caption"\na.png,a dog\n',
        '\ufeff"image", "caption"\r\n"a.png", "a dog"\r\n',
        "image,caption,other,other\na.png,a dog,1,2\n",
    ],
)
def test_names_of_columns_may_have_marks_blanks_and_quotes(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    example = open_folder(tmp_path)[0]
    assert (example["key"], example["captions"]) == ("a.png", ("a dog",))


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption,caption\na.png,a,b\n")
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["image", "caption", "caption"])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(UserError, match=r"2 .*'caption'"):
            open_folder(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize(
    ("encoding", "found"),
    [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-32", "UTF-32")],
)
def test_another_encoding_of_a_file_is_named(tmp_path, name, encoding, found):
    row = json.dumps({"image": "a.png", "caption": "a dog"})
    text = "image,caption\na.png,a dog\n" if name == "a.csv" else f"{row}\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=rf"{found}.*UTF-8"):
        open_folder(tmp_path)


def test_latin_1_in_a_row_is_named_with_its_letter(tmp_path):
    (tmp_path / "a.csv").write_bytes("image,caption\nb.png,ok\na.png,un café\n".encode("cp1252"))
    source = open_folder(tmp_path)
    with pytest.raises(BadSampleError, match=r"0xe9 .* 'é' .*Latin-1") as raised:
        source[1]
    assert raised.value.kind == "not_utf8"


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_file_of_another_normal_form_is_found(tmp_path, noise, encode, on_disk, listed):
    stored, named = (unicodedata.normalize(form, "é/ö.png") for form in (on_disk, listed))
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).write_bytes(encode(noise(4, 7, 3)))
    (tmp_path / "a.csv").write_text(f"image,caption\n{named},a\n", encoding="utf-8")
    (tmp_path / "captions_x.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": named}],
                "annotations": [{"image_id": 1, "caption": "a"}],
            }
        )
    )
    for name in ("a.csv", "captions_x.json"):
        assert decode(open_folder(tmp_path / name)[0]["image"]).size == (7, 4)


def test_rows_may_name_files_outside_their_folder(tmp_path, noise, encode):
    """The list is the user's own; a tar is a stranger's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").write_bytes(encode(noise(4, 7, 3)))
    paths = (str(tmp_path / "a.png"), "../a.png")
    for name in paths:
        row = {"image": name, "caption": "a"}
        (tmp_path / "data" / "captions.jsonl").write_text(json.dumps(row))
        assert decode(open_folder(tmp_path / "data")[0]["image"]).size == (7, 4)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "datasets"])
def test_a_folder_whose_name_is_not_utf8_is_read_and_its_rows_are_kept(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(grouping, "CACHE_FROM_SECONDS", 0)
    table = pa.table({"image": ["a.png", "a.png", "b.png"], "caption": ["a", "one", "b"]})
    made, folder = tmp_path / "made", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    made.mkdir()
    if kind == "parquet":
        parquet.write_table(table, made / "a.parquet")
    elif kind == "datasets":
        datasets.Dataset(table).save_to_disk(made)
    elif kind == "csv":
        (made / "a.csv").write_text("image,caption\na.png,a\na.png,one\nb.png,b\n")
    else:
        (made / "a.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    made.rename(folder)
    for _ in range(2):
        source = open_folder(folder)
        assert [source[i]["captions"] for i in range(2)] == [("a", "one"), ("b",)]
    assert len(list(folder.glob("lit_jax-groups-*.arrow"))) == 1


# Damaged files.


def test_damaged_texts_of_arrow_are_bad_samples(tmp_path):
    """Arrow itself would end the process: SIGABRT or SIGBUS."""
    rows = {"image": [f"{i}.png" for i in range(8)], "caption": [f"a dog {i}" for i in range(8)]}
    datasets.Dataset(pa.table(rows)).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    content = file.read_bytes()
    place = content.rindex(struct.pack("<9i", *range(0, 8 * 7 + 1, 7)))
    for value in (-1, 2**31 - 1, -(2**31)):
        damaged = bytearray(content)
        damaged[place + 8 : place + 12] = struct.pack("<i", value)
        file.unlink()  # the first of them is still mapped
        file.write_bytes(damaged)
        source = open_folder(tmp_path)
        assert len(source) == 8
        for index in range(8):
            with pytest.raises(BadSampleError) as raised:
                source[index]
            assert raised.value.kind == "damaged"


@pytest.mark.parametrize("content", [b"", b"PARE" * 8, b"PAR1" + bytes(60) + b"PARE", b"PAR1PAR1"])
def test_parquet_that_is_empty_or_encrypted_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet .*\("):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("00000_stats.json", "--output_format="),
        ("00000.tfrecord", "--output_format=webdataset"),
        ("a.feather", "Parquet"),
        ("a.pkl", "Parquet"),
    ],
)
def test_other_files_of_tables_say_what_to_write_instead(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"x")
    # img2dataset writes this log of addresses beside each file of images.
    if name == "00000.tfrecord":
        parquet.write_table(pa.table({"url": ["http://a"]}), tmp_path / "00000.parquet")
    with pytest.raises(UserError, match=rf"{re.escape(name)}\b.*{remedy}"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"image,caption\ra.png,a\r"),
        ("a.tsv", b"image\tcaption\ra.png\ta\r"),
        ("a.tsv", b"a dog\ta.png\ra cat\tb.png\r"),
    ],
)
def test_lines_that_end_with_carriage_returns_alone_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"carriage returns"):
        open_folder(tmp_path)


def test_images_beside_their_addresses_need_no_download(tmp_path):
    """img2dataset writes such Parquet files."""
    table = pa.table({"url": ["http://a"], "caption": ["a"], "jpg": [b"a"]})
    parquet.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"jpg \(binary\)") as raised:
        open_folder(tmp_path)
    assert "img2dataset" not in str(raised.value)


@pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
def test_images_that_are_written_as_text_are_named(tmp_path, noise, encode, before):
    rows = [
        {"image": before + base64.b64encode(encode(noise(9, 9, 3))).decode(), "caption": "a"}
        for _ in range(2)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"base64") as raised:
        open_folder(tmp_path)
    assert len(str(raised.value)) < 400
    assert len(open_source(SourceConfig(path=str(tmp_path)), text_only=True)) == 2


def test_a_quote_that_is_escaped_by_a_backslash_is_explained(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na.png,"a \\"b\\" c"\n')
    with pytest.raises(BadSampleError, match="twice"):
        open_folder(tmp_path)[0]
