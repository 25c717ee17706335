"""What data calls the classes, and which class each example then has."""

import logging
import re

import numpy as np
import pytest
from PIL import Image

from lit_jax.config import SourceConfig
from lit_jax.data.sources import open_source
from lit_jax.errors import UserError
from lit_jax.evals import probe
from lit_jax.evals.classes import Classes
from lit_jax.evals.labels import Labels, label_ids
from tests.evals.conftest import ListSource

ELEVEN = [str(n) for n in range(1, 12)]


def relabel(pictures, labels) -> ListSource:
    return ListSource(
        {**example, "label": label} for example, label in zip(pictures, labels, strict=False)
    )


def numbered(count: int) -> Classes:
    return Classes(names=tuple(f"kind {n}" for n in range(count)), templates=("{}",))


@pytest.fixture
def class_folders(tmp_path):
    """Makes a source of folders, one image each."""

    def make(names):
        for name in names:
            (tmp_path / name).mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        source = open_source(SourceConfig(path=str(tmp_path)))
        return source, [source[i]["label"] for i in range(len(source))]

    return make


def test_labels_become_positions_in_the_class_list(pictures):
    classes = Classes(names=("c", "a", "b", "unused"), templates=("{}",))
    assert label_ids(Labels(pictures), classes)[:4].tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("labels", ["abc", "cab"])
def test_labels_may_be_others_than_the_names(pictures, labels):
    """But where a data set has the names themselves, these are meant."""
    classes = Classes(names=("zett", "aa", "be"), labels=tuple(labels))
    expected = [labels.index(label) for label in "abca"]
    assert label_ids(Labels(pictures), classes)[:4].tolist() == expected
    assert label_ids(Labels(relabel(pictures, ["be", "zett"])), classes).tolist() == [2, 0]


def test_labels_may_be_numbers_or_put_in_order_by_sorting(pictures):
    classes = Classes(names=("crane", "crane", "dog"), templates=("{}",))
    assert label_ids(Labels(relabel(pictures, "2010")), classes).tolist() == [2, 0, 1, 0]
    folders = relabel(pictures, ["n03", "n01", "n02", "n01"])
    assert label_ids(Labels(folders), classes, order="sorted").tolist() == [2, 0, 1, 0]
    digits = Classes(names=("1", "0"), templates=("{}",))  # names, not positions
    assert label_ids(Labels(relabel(pictures, "01")), digits).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "order", "expected"),
    [
        (ELEVEN, "sorted", range(11)),
        (ELEVEN, "sorted_as_numbers", range(11)),
        (ELEVEN, "sorted_as_text", [0, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2]),
        ([f"{n:03}" for n in range(1, 12)], "sorted", range(11)),
        ([f"{n:02}" for n in range(11)], "given", range(11)),  # positions from 0
        ([f"{n}.0" for n in range(11)], "given", range(11)),
        (["10", "-2", "900", "0", "20"], "sorted", [2, 0, 4, 1, 3]),
        (["2", "10", "02", "10.0", "3"], "sorted", [0, 2, 0, 2, 1]),
        (["2", "10", "b"], "sorted", [1, 0, 2]),  # not all are numbers
        (["n10", "n9", "n1"], "sorted", [1, 2, 0]),
        ([" 10", "2", "9 "], "sorted", [2, 0, 1]),
        (["b", " c", "a"], "sorted", [1, 2, 0]),
        (
            ["cafe\u0301", "dog", "caf\xe9"],
            "sorted",
            [0, 1, 0],
        ),  # é as macOS writes it, and as others do
        (["1_0", "2", "30"], "sorted", [0, 1, 2]),
        (["٣", "10", "2"], "sorted", [2, 0, 1]),  # a digit, but not as numbers are written in files
        (["1" * 5000, "10", "2"], "sorted", [1, 0, 2]),  # more digits than Python reads
    ],
)
def test_labels_that_are_all_whole_numbers_have_the_order_of_numbers(
    pictures, labels, order, expected
):
    source = relabel(pictures, labels)
    classes = numbered(len(set(expected)))
    assert label_ids(Labels(source), classes, order=order).tolist() == list(expected)


@pytest.mark.parametrize(
    ("listed", "labels", "expected"),
    [
        (("1", "2", "3"), ["03", "1", "2.0"], [2, 0, 1]),
        (("01", "02", "10"), ["10", "1", "2"], [2, 0, 1]),
        (("1", "01", "2"), ["01", "1", "2"], [1, 0, 2]),  # two classes that are one number
        (("n1", "n2", "7"), ["7", "n1"], [2, 0]),
    ],
)
def test_listed_labels_that_are_numbers_are_found_in_any_spelling(
    pictures, listed, labels, expected
):
    classes = Classes(names=("a", "b", "c"), labels=listed)
    assert label_ids(Labels(relabel(pictures, labels)), classes).tolist() == expected


def test_a_class_is_found_in_another_normal_form_of_unicode_and_with_blanks(class_folders):
    source, labels = class_folders(["cafe\u0301", "dog"])
    found = label_ids(Labels(source), Classes(names=("dog ", "caf\xe9")))
    assert found.tolist() == [int(label != "dog") for label in labels]
    # Two folders that differ in nothing but the normal form are two classes.
    source, labels = class_folders(["caf\xe9"])
    names = ("cafe\u0301", "caf\xe9", "dog")
    found = label_ids(Labels(source), Classes(names=names))
    assert found.tolist() == [names.index(label) for label in labels]


def test_the_first_pairs_of_label_and_class_are_shown(pictures, caplog):
    caplog.set_level(logging.INFO, logger="lit_jax")
    label_ids(Labels(relabel(pictures, ELEVEN)), numbered(11), order="sorted")
    assert re.search(r"1 \w+ 'kind 0', 2 \w+ 'kind 1', 3 \w+ 'kind 2' \.\.\.", caplog.text)
    caplog.clear()
    label_ids(Labels(pictures), Classes(names=("a", "b", "c")))
    assert not caplog.text


def test_class_folders_with_two_orders_have_to_say_which(class_folders):
    source, labels = class_folders(ELEVEN)
    both = "1, 2, 3, 4 .*1, 10, 11, 2 .*--eval.labels=sorted_as_numbers or --eval.labels=sorted_as_text"
    with pytest.raises(UserError, match=both):
        label_ids(Labels(source), numbered(11), order="sorted")
    with pytest.raises(UserError, match=rf"11, .*{both}"):
        label_ids(Labels(source), numbered(11))
    by_number = label_ids(Labels(source), numbered(11), order="sorted_as_numbers")
    assert by_number.tolist() == [int(label) - 1 for label in labels]
    by_text = label_ids(Labels(source), numbered(11), order="sorted_as_text")
    assert by_text.tolist() == [sorted(ELEVEN).index(label) for label in labels]


@pytest.mark.parametrize("names", [ELEVEN[:9], [f"{n:02}" for n in range(1, 12)], ["a", "b"]])
def test_class_folders_with_one_order_are_sorted(class_folders, names):
    source, labels = class_folders(names)
    expected = [sorted(names).index(label) for label in labels]
    assert label_ids(Labels(source), numbered(len(names)), order="sorted").tolist() == expected


@pytest.mark.parametrize(
    ("labels", "names", "order", "message"),
    [
        ("ab", ("a", "bb"), "given", r"picture1 .*'b', .*'bb'"),
        ([None, None], ("a", "b"), "given", r"\b2 .*--eval.data.label_key"),
        (["-1", "-1"], ("a", "b"), "given", r"\b2 .*--eval.data.label_key"),
        (
            "013",
            ("a", "b", "c"),
            "given",
            r"label 3, .*--eval.labels=sorted",
        ),
        (
            "0135",
            ("a", "b", "c"),
            "given",
            r'picture2 .*3, .*3 .*0 .*2; .* "labels"',
        ),
        (["-2", "0"], ("a", "b", "c"), "given", r"-2, .*3 classes"),
        (["-1", *ELEVEN], numbered(11).names, "given", r"--eval.labels=sorted .*1 .*11"),
        (
            ELEVEN,
            numbered(11).names,
            "given",
            r"11, .*--eval.labels=sorted .*1 .*11",
        ),
        ("ab", ("a", "b", "a"), "given", r"'a' .*2 .*--eval.labels=sorted"),
        ("ab", ("a", "b", "c"), "sorted", r"\b2 .*\b3 .*--eval.labels"),
        ("a1", ("a", "b"), "sorted_as_numbers", r"'a' .*'sorted_as_text'"),
    ],
)
def test_class_list_and_data_that_disagree(pictures, labels, names, order, message):
    with pytest.raises(UserError, match=message):
        label_ids(
            Labels(relabel(pictures, labels)), Classes(names=names, templates=("{}",)), order=order
        )


@pytest.mark.parametrize(
    ("labels", "names", "order", "expected"),
    [
        (["a", None, "b", None], "ab", "given", [0, -1, 1, -1]),
        (["1", "-1", "0", None], "ab", "given", [1, -1, 0, -1]),
        (["1", "-1", "0", "-1.0"], "10", "given", [0, -1, 1, -1]),  # names that are numbers
        (["b", "-1", "a"], "ab", "given", [1, -1, 0]),
        (["7", "-1", "9"], "ab", "sorted", [0, -1, 1]),
        (["1", "-1", "0"], "abc", "sorted", [2, 0, 1]),  # three classes, of which -1 is one
        (["n2", "-1", "n1"], "ab", "sorted_as_text", [1, -1, 0]),
    ],
)
def test_examples_without_a_label_are_left_out_and_counted_once(
    pictures, caplog, labels, names, order, expected
):
    found = Labels(relabel(pictures, labels))
    classes = Classes(names=tuple(names), templates=("{}",))
    for _ in range(2):  # as for two languages
        assert label_ids(found, classes, order=order).tolist() == expected
    count = expected.count(-1)
    assert len(re.findall(rf" {count} \w+ {len(labels)} ", caplog.text)) == bool(count)
    assert ("picture1" in caplog.text) == bool(count)


def test_a_list_among_missing_labels_is_named_with_them(pictures):
    source = relabel(pictures, [None, None])
    source[1]["label_problem"] = "it is ['a']"
    with pytest.raises(UserError, match=r"\b2 .*\b1 .*--eval.data.label_key.*: .*\['a'\]"):
        Labels(source)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["-1", "0", "1", None], ["1", "-1", None], ([-1, 0, 1, -1], [1, -1, -1])),
        (["-1", "1"], ["1", "-1"], ([0, 1], [1, 0])),  # as a support vector machine has them
        (["cat", "dog", "-1"], ["dog"], ([0, 1, -1], [1])),
    ],
)
def test_a_probe_leaves_out_examples_without_a_label(pictures, train, test, expected):
    found = probe.class_ids(*(Labels(relabel(pictures, labels)) for labels in (train, test)))
    assert tuple(ids.tolist() for ids in found) == expected


def test_data_of_which_no_example_can_be_read_says_why(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,label\na.jpg,1,2\nb.jpg\n")
    source = open_source(SourceConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"\b2 .*byte 12 .*3 fields .*2 columns"):
        label_ids(Labels(source), numbered(2))


def test_a_probe_knows_a_number_in_any_spelling(pictures):
    train_N, test_M = probe.class_ids(
        Labels(relabel(pictures, ["10", "9", "10", "9.0"])),
        Labels(relabel(pictures, ["09", "10.0"])),
    )
    np.testing.assert_array_equal(train_N, [0, 1, 0, 1])
    np.testing.assert_array_equal(test_M, [1, 0])
    with pytest.raises(UserError, match=r"'8' .*\(picture0\)"):
        probe.class_ids(Labels(relabel(pictures, ["10", "9"])), Labels(relabel(pictures, ["8"])))
