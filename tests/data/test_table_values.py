"""Labels and captions in tables: numbers, texts, bytes, lists, and nothing."""

import decimal
import json
import math

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.data.example import BadSampleError, usable_label
from tests.data.test_tables import open_folder

LABELS = [
    (0.0, "0"),
    (1.0, "1"),
    (math.nan, None),
    (None, None),
    (2, "2"),
    ("dog", "dog"),
    (True, "True"),
    ("", None),
    ("7.0", "7.0"),
]
NO_LABELS = [0.5, math.inf, ["dog"], {"id": 3}, []]


@pytest.mark.parametrize(("value", "label"), LABELS)
def test_a_label_is_a_text_or_a_whole_number(tmp_path, value, label):
    row = {"image": "a.png", "caption": "a", "label": value}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    assert usable_label(open_folder(tmp_path)[0]) == label


@pytest.mark.parametrize("value", NO_LABELS)
def test_another_label_is_bad_where_labels_count_and_only_there(tmp_path, value):
    row = {"image": "a.png", "caption": "a", "label": value}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    example = open_folder(tmp_path)[0]
    assert (example["captions"], example["label"]) == (("a",), None)
    with pytest.raises(BadSampleError, match=r'"label"') as raised:
        usable_label(example)
    assert raised.value.kind == "no_example"
    row.pop("caption")
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadSampleError, match=r'"label"'):
        open_folder(tmp_path, templates=("a {}",))[0]


@pytest.mark.parametrize(
    ("key", "found"),
    [(7, "7"), (7.0, "7"), ("k", "k"), (True, "a.png"), ([1], "a.png"), (None, "a.png")],
)
def test_a_key_of_another_type_spoils_nothing(tmp_path, key, found):
    row = {"image": "a.png", "caption": "a", "key": key, "teacher_caption": 3, "other": {"x": [1]}}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    example = open_folder(tmp_path)[0]
    assert (example["key"], example["captions"]) == (found, ("a",))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1.0", "", "12.0"], ["1", None, "12"]),
        (["1.0", "1.5", ""], ["1.0", "1.5", None]),
        (["1", "01", "x"], ["1", "01", "x"]),
        (["1.0", "nan", "NaN"], ["1", None, None]),
        (["1", "NaN", "007"], ["1", None, "007"]),
        (["naan", "nan", "1.0"], ["naan", "nan", "1.0"]),  # kinds of bread
    ],
)
def test_labels_that_pandas_writes_as_floats_are_whole_numbers(tmp_path, labels, expected):
    lines = [f"{i}.png,a,{label}" for i, label in enumerate(labels)]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption,label", *lines]))
    source = open_folder(tmp_path)
    assert [source[i]["label"] for i in range(3)] == expected


COLUMNS = {
    "floats": (pa.array([0.0, None, math.nan]), ["0", None, None]),
    "decimals": (pa.array([decimal.Decimal("1.00"), None, decimal.Decimal(2)]), ["1", None, "2"]),
    "bools": (pa.array([True, False, None]), ["True", "False", None]),
    "a categorical": (pa.array(["x", "y", None]).dictionary_encode(), ["x", "y", None]),
    "small integers": (pa.array([0, 1, None], pa.uint8()), ["0", "1", None]),
    "lists": (pa.array([[1], [], None]), ["bad", "bad", None]),
    "mappings": (pa.array([{"id": 1}, None, {"id": 2}]), ["bad", None, "bad"]),
}


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
@pytest.mark.parametrize("name", COLUMNS)
def test_labels_of_any_column_spoil_no_pair(tmp_path, name, kind):
    column, labels = COLUMNS[name]
    images = [{"path": f"{i}.png", "bytes": b"x"} for i in range(3)]
    table = pa.table({"image": images, "caption": ["a"] * 3, "label": column, "key": column})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        if pa.types.is_dictionary(column.type):
            # `datasets` itself writes no such column.
            table = table.set_column(2, "label", column.cast(pa.string())).drop_columns("key")
        datasets.Dataset(table).save_to_disk(tmp_path)
    source = open_folder(tmp_path)
    found = [source[i] for i in range(3)]
    assert [example["captions"] for example in found] == [("a",)] * 3
    said = ["bad" if "label_problem" in example else example["label"] for example in found]
    assert said == labels


def test_the_number_of_a_class_may_be_written_as_a_float(tmp_path):
    features = datasets.Features(
        image=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    table = datasets.Dataset.from_dict({"image": ["a"] * 2, "label": [0, 1]}, features).data.table
    floats = table.set_column(1, "label", pa.array([1.0, -1.0]))
    parquet.write_table(
        floats.replace_schema_metadata(table.schema.metadata), tmp_path / "a.parquet"
    )
    source = open_folder(tmp_path)
    assert [source[i]["label"] for i in range(2)] == ["dog", None]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_texts_that_parquet_holds_as_bytes_are_texts(tmp_path, kind):
    """As Spark and Hive write them."""
    texts = {"caption": ["Fluß".encode(), b"\xff", None], "label": [b"cat", b"dog", None]}
    table = {name: pa.array(column, kind) for name, column in texts.items()}
    table["captions"] = pa.array([[b"river"], None, ["naß".encode()]], pa.list_(kind))
    parquet.write_table(
        pa.table({"image": ["a.png", "b.png", "c.png"], **table}), tmp_path / "a.parquet"
    )
    source = open_folder(tmp_path)
    assert (source[0]["captions"], source[0]["label"]) == (("Fluß", "river"), "cat")
    assert source[2]["captions"] == ("naß",)
    with pytest.raises(BadSampleError) as raised:
        source[1]
    assert raised.value.kind == "not_utf8"


def test_null_in_a_list_of_captions_is_none(tmp_path):
    table = pa.table({"image": ["a.png"], "caption": [["a", None, "b"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert open_folder(tmp_path)[0]["captions"] == ("a", "b")


@pytest.mark.parametrize("missing", ["NA", "NULL", "None", "<NA>", "n/a", r"\N", "nan", ""])
def test_a_missing_label_among_whole_numbers_is_no_label(tmp_path, missing):
    """As R, SQL and pandas write it."""
    rows = "".join(f"{i}.png,text,{label}\n" for i, label in enumerate(("1.0", missing, "2.0")))
    (tmp_path / "a.csv").write_text(f"image,caption,label\n{rows}")
    source = open_folder(tmp_path)
    assert [source[i]["label"] for i in range(3)] == ["1", None, "2"]


def test_a_missing_text_may_be_nan_as_pandas_has_it(tmp_path):
    rows = [
        {"image": "a.png", "caption": math.nan, "captions": [math.nan, "a"]},
        {"image": "b.png", "captions": {"en": math.nan, "de": [math.nan, "b"]}},
        {"image": math.nan, "caption": "c"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_folder(tmp_path)
    assert [source[i]["captions"] for i in (0, 1)] == [("a",), ("b",)]
    with pytest.raises(BadSampleError) as raised:
        source[2]
    assert raised.value.kind == "missing"
