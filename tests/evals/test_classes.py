"""Class and template files of both forms, and what data calls the classes."""

import json

import pytest

from lit_jax.config import EvalConfig
from lit_jax.errors import UserError
from lit_jax.evals.classes import (
    DEFAULT_TEMPLATES,
    PLACEHOLDER,
    Classes,
    label_ids,
    load_classes,
)

THEIR_NAMES = {"imagenet1k": ["crane", "crane", "dog"], "vtab/pets": ["cat", "dog"]}
THEIR_TEMPLATES = {
    "imagenet1k": ["a bad photo of a {c}.", "a {c}"],
    "vtab/pets": {"cat": ["A cat purrs.", "It meows."], "dog": ["A dog barks."]},
}


def write(folder, content, name="classes.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def load(folder, content, **config) -> Classes:
    return load_classes(EvalConfig(classes=write(folder, content), **config), "pets")


def test_classes_fill_both_kinds_of_placeholder(tmp_path):
    content = {"classnames": ["cat", "d{}\\1"], "templates": ["a {}", "{c}, a {c}"]}
    classes = load(tmp_path, content)
    assert classes.names == ("cat", "d{}\\1")
    assert classes.texts() == [("a cat", "cat, a cat"), ("a d{}\\1", "d{}\\1, a d{}\\1")]


def test_files_of_clip_benchmark_for_several_data_sets(tmp_path):
    templates = write(tmp_path, THEIR_TEMPLATES, "templates.json")
    for dataset, expected in {
        "vtab/pets": [("A cat purrs.", "It meows."), ("A dog barks.",)],
        "imagenet1k": [("a bad photo of a crane.", "a crane")] * 2
        + [("a bad photo of a dog.", "a dog")],
    }.items():
        classes = load(tmp_path, THEIR_NAMES, dataset=dataset, templates=templates)
        assert classes.texts() == expected
    names = {"some/pets": ["cat"]}  # the evaluation's name finds it; the templates are ImageNet's
    templates = write(tmp_path, {"imagenet1k": ["a {c}"], "other": ["{c}!"]}, "templates.json")
    assert load(tmp_path, names, templates=templates).texts() == [("a cat",)]


def test_the_language_stands_in_the_path(tmp_path):
    write(tmp_path, {"pets": ["猫", "犬"]}, "jp_classnames.json")
    write(tmp_path, {"pets": ["{c}の写真"]}, "jp_templates.json")
    config = EvalConfig(
        classes=str(tmp_path / "{language}_classnames.json"),
        templates=str(tmp_path / "{language}_templates.json"),
    )
    assert load_classes(config, "pets", "jp").texts() == [("猫の写真",), ("犬の写真",)]


def test_our_own_templates_where_none_are_given(tmp_path):
    assert len(DEFAULT_TEMPLATES["en"]) >= 7
    assert all(PLACEHOLDER.search(template) for template in DEFAULT_TEMPLATES["en"])
    content = {"classnames": ["cat"]}
    assert load(tmp_path, content).templates == DEFAULT_TEMPLATES["en"]
    config = EvalConfig(classes=write(tmp_path, content))
    assert load_classes(config, "pets", "sw").texts() == [("cat",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "must be"),
        ({}, "must be"),
        ({"templates": ["{}"]}, "'classnames' a list of one text or more"),
        ({"classnames": [], "templates": ["{}"]}, "'classnames' a list"),
        ({"classnames": [1], "templates": ["{}"]}, "'classnames' a list"),
        ({"classnames": "cat", "templates": ["{}"]}, "'classnames' a list"),
        ({"classnames": ["cat", " "]}, "'classnames' of .* has an empty text"),
        ({"classnames": ["cat"], "templates": []}, "'templates' a list"),
        ({"classnames": ["cat"], "templates": ["a photo"]}, r"'a photo' .* needs '\{\}'"),
        ({"classnames": ["cat", "dog", "cat"], "templates": ["{}"]}, "'cat' is 2 times"),
        (
            {"classnames": ["cat", "dog"], "labels": ["n1", "n1"], "templates": ["{}"]},
            "'n1' is 2 times among the labels",
        ),
        (
            {"classnames": ["cat", "dog"], "labels": ["n1"], "templates": ["{}"]},
            "2 classnames but 1 labels",
        ),
        ({"pet": ["cat"], "cars": ["Audi"]}, "has no data set 'pets'.*did you mean 'pet'"),
        ({"pets": []}, "'pets' a list of one text or more"),
    ],
)
def test_a_bad_class_file_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pets": ["a photo"]}, r"'a photo' in .*templates.json needs '\{\}' or '\{c\}'"),
        ({"pets": {"cat": ["meow"]}}, "no sentences for the class 'dog'"),
        ({"pets": {"cat": ["meow"], "dog": []}}, "'dog' a list of one text or more"),
    ],
)
def test_a_bad_template_file_is_refused(tmp_path, content, message):
    templates = write(tmp_path, content, "templates.json")
    with pytest.raises(UserError, match=message):
        load(tmp_path, {"pets": ["cat", "dog"]}, templates=templates)


def test_a_missing_class_file_is_named(tmp_path):
    config = EvalConfig(classes=str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read: No such file"):
        load_classes(config, "pets")


def relabel(pictures, labels):
    return type(pictures)(
        {**example, "label": label} for example, label in zip(pictures, labels, strict=False)
    )


def test_labels_become_positions_in_the_class_list(pictures):
    classes = Classes(names=("c", "a", "b", "unused"), templates=("{}",))
    assert label_ids(pictures, classes)[:4].tolist() == [1, 2, 0, 1]


def test_labels_may_be_others_than_the_names(tmp_path, pictures):
    content = {"classnames": ["zett", "aa", "be"], "labels": ["c", "a", "b"], "templates": ["{}"]}
    classes = load(tmp_path, content)
    assert classes.texts() == [("zett",), ("aa",), ("be",)]
    assert label_ids(pictures, classes)[:4].tolist() == [1, 2, 0, 1]


def test_labels_may_be_numbers_or_put_in_order_by_sorting(pictures):
    classes = Classes(names=("crane", "crane", "dog"), templates=("{}",))
    assert label_ids(relabel(pictures, "2010"), classes).tolist() == [2, 0, 1, 0]
    folders = relabel(pictures, ["n03", "n01", "n02", "n01"])
    assert label_ids(folders, classes, order="sorted").tolist() == [2, 0, 1, 0]
    digits = Classes(names=("1", "0"), templates=("{}",))  # names, not positions
    assert label_ids(relabel(pictures, "01"), digits).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "order", "message"),
    [
        ("ab", ("a", "bb"), None, r"picture1 has the label 'b', .* did you mean 'bb'"),
        (["a", None], ("a", "b"), None, "picture1 has no label"),
        (
            "013",
            ("a", "b", "c"),
            None,
            "picture2 has the label 3, out of the range of the 3 classes, 0 to 2",
        ),
        ("ab", ("a", "b", "a"), None, "'a' is 2 times among the classes"),
        ("ab", ("a", "b", "c"), "sorted", "2 different labels but the class file 3 classes"),
    ],
)
def test_class_list_and_data_that_disagree(pictures, labels, names, order, message):
    with pytest.raises(UserError, match=message):
        label_ids(relabel(pictures, labels), Classes(names=names, templates=("{}",)), order=order)
