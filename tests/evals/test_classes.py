"""Class and template files of all forms."""

import json
import re

import pytest

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.configs.vit_bert import DIGITS
from lit_jax.errors import UserError
from lit_jax.evals.classes import (
    DEFAULT_TEMPLATES,
    PLACEHOLDER,
    Classes,
    classes_in,
    load_classes,
)
from tests.object_store.served import BUCKET, serve

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
        ("{", r"JSON"),
        ([], '"id2label": '),
        ({}, '"id2label": '),
        ("3", '"id2label": '),
        ([1], '"id2label": '),
        ({"id2label": {"0": "cat", "b": "dog"}}, r"id2label"),
        ({"0": "cat", "1": " "}, r"'id2label'"),
        ({"templates": ["{}"]}, r"'classnames'"),
        ({"classnames": [], "templates": ["{}"]}, r"'classnames'"),
        ({"classnames": [1], "templates": ["{}"]}, r"'classnames'"),
        ({"classnames": "cat", "templates": ["{}"]}, r"'classnames'"),
        ({"classnames": ["cat", " "]}, r"'classnames'"),
        ({"classnames": ["cat"], "templates": []}, r"'templates'"),
        ({"classnames": ["cat"], "templates": ["a photo"]}, r"'a photo' .*'\{\}'"),
        ({"classnames": ["cat", "dog", "cat"], "templates": ["{}"]}, r"'cat' .*2"),
        (
            {"classnames": ["cat", "dog"], "labels": ["n1", "n1"], "templates": ["{}"]},
            r"'n1' .*\b2\b",
        ),
        (
            {"classnames": ["cat", "dog"], "labels": ["n1"], "templates": ["{}"]},
            r"\b2 .*\b1\b",
        ),
        ({"pet": ["cat"], "cars": ["Audi"]}, r"'pets'.*'pet'"),
        ({"pets": []}, r"'pets'"),
    ],
)
def test_a_bad_class_file_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pets": ["a photo"]}, r"'a photo' .*templates.json .*'\{\}' .*'\{c\}'"),
        ({"pets": {"cat": ["meow"]}}, r"'dog'"),
        ({"pets": {"cat": ["meow"], "dog": []}}, r"'dog'"),
    ],
)
def test_a_bad_template_file_is_refused(tmp_path, content, message):
    templates = write(tmp_path, content, "templates.json")
    with pytest.raises(UserError, match=message):
        load(tmp_path, {"pets": ["cat", "dog"]}, templates=templates)


def test_a_missing_class_file_is_named(tmp_path):
    config = EvalConfig(classes=str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match=r"nowhere\.json"):
        load_classes(config, "pets")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "cat\n\n  dog \r\n[mouse]"),
        ("classes.txt", "\ufeffcat\ndog\n[mouse]\n"),
        ("names", "cat\ndog\n[mouse]"),
        ("classes.json", ["cat", "dog", "[mouse]"]),
        ("classes.txt", '["cat",\n "dog", "[mouse]"]'),
        ("classes.json", {"1": "dog", "0": "cat", "2": "[mouse]"}),
        ("classes.json", {"dog": 1, "cat": 0, "[mouse]": 2}),
        (
            "config.json",
            {"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "[mouse]"}},
        ),
    ],
)
def test_other_forms_of_class_files(tmp_path, name, content):
    classes = load_classes(EvalConfig(classes=write(tmp_path, content, name)), "pets")
    assert classes.names == ("cat", "dog", "[mouse]")
    assert classes.labels == ()
    assert classes.templates == DEFAULT_TEMPLATES["en"]


def test_numbers_that_do_not_count_from_zero_are_the_labels(tmp_path):
    classes = load(tmp_path, {"10": "dog", "7": "cat"})
    assert (classes.names, classes.labels) == (("cat", "dog"), ("7", "10"))
    keras = {"10": ["n3", "eel"], "2": ["n2", "dog"], "1": ["n1", "cat"]}
    classes = load(tmp_path, keras)
    assert (classes.names, classes.labels) == (("cat", "dog", "eel"), ("n1", "n2", "n3"))
    content = {"classnames": ["cat", "dog"], "labels": [7, 10]}
    assert load(tmp_path, content).labels == ("7", "10")


@pytest.mark.parametrize(
    ("name", "content"), [("t.txt", "a {c}\n\n{}!\n"), ("t.json", ["a {c}", "{}!"])]
)
def test_other_forms_of_template_files(tmp_path, name, content):
    templates = write(tmp_path, content, name)
    assert load(tmp_path, ["cat"], templates=templates).texts() == [("a cat", "cat!")]


def test_a_class_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "classes.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt .*UTF-8"):
        load_classes(EvalConfig(classes=str(tmp_path / "classes.txt")), "pets")


BESIDE = (
    {"path": ""},
    {"path": "", "split": "test"},
    {"path": "test"},
    {"path": "test/{0..3}.tar"},
)


def benchmark_layout(folder, **files) -> None:
    """CLIP_benchmark's, without the tars."""
    (folder / "test").mkdir(exist_ok=True)
    (folder / "classnames.txt").write_text("crane\ncrane\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n{c}\n")
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)


@pytest.mark.parametrize("source", BESIDE)
def test_class_names_and_templates_that_lie_in_the_data(tmp_path, source):
    """As CLIP_benchmark writes them, whatever of the data set is named."""
    benchmark_layout(tmp_path, dataset_type="classification\n")
    data = SourceConfig(**{**source, "path": str(tmp_path / source["path"])})
    classes = load_classes(EvalConfig(data=data), "pets")
    assert classes.names == ("crane", "crane", "dog")
    assert classes.texts()[2] == ("a dog.", "dog")
    own = EvalConfig(data=data, classes=write(tmp_path, ["ours"]))
    assert load_classes(own, "pets").texts()[0][:2] == ("ours", "a photo of ours")
    mixed = EvalConfig(data=data, templates=write(tmp_path, ["{}!"], "t.json"))
    assert load_classes(mixed, "pets").texts()[2] == ("dog!",)


@pytest.mark.parametrize("task", ["retrieval", " Retrieval\n"])
def test_data_for_retrieval_has_no_classes(tmp_path, task):
    benchmark_layout(tmp_path, dataset_type=task)
    assert classes_in(SourceConfig(path=str(tmp_path), split="test")) is None


def test_data_with_several_classes_an_image_is_refused(tmp_path):
    benchmark_layout(tmp_path, dataset_type="multilabel")
    with pytest.raises(UserError, match="dataset_type"):
        classes_in(SourceConfig(path=str(tmp_path)))


def test_a_folder_of_other_data_beside_is_not_looked_into(tmp_path):
    benchmark_layout(tmp_path)
    (tmp_path / "flickr").mkdir()
    for path in ("flickr", "nowhere/at/all", "flickr\0"):
        assert classes_in(SourceConfig(path=str(tmp_path / path))) is None
    assert classes_in(SourceConfig(path=str(DIGITS))) is None


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_class_names_in_an_object_store(tmp_path, scheme):
    (tmp_path / "pets").mkdir()
    benchmark_layout(tmp_path / "pets")
    (tmp_path / "pets" / "test" / "0.tar").write_bytes(b"")
    with serve(tmp_path) as address:
        home = f"{scheme}://anonymous@{BUCKET}/pets"
        for path, split in ((home, "test"), (f"{home}/test", None)):
            data = SourceConfig(path=address(path), split=split)
            classes = load_classes(EvalConfig(data=data), "pets")
            assert (classes.names, classes.templates) == (
                ("crane", "crane", "dog"),
                ("a {c}.", "{c}"),
            )
        file = address(f"{home}/classnames.txt")
        assert load_classes(EvalConfig(classes=file), "pets").names == ("crane", "crane", "dog")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "0 cat\n1 dog\n"),
        ("a.txt", "1. cat\n2. dog\n"),
        ("a.txt", "0,cat\n1,dog\n"),
        ("a.txt", "cat\t0\ndog\t1\n"),
        ("a.txt", "n02123045 tabby, tabby cat\nn02099601 golden retriever\n"),
        ("a.txt", '"cat",\n"dog",\n'),
        ("a.txt", "# pets\ncat\ndog\n"),
        ("a.yaml", "- cat\n- dog\n"),
        ("a.csv", "name\ncat\ndog\n"),
    ],
)
def test_numbers_and_marks_do_not_become_part_of_the_names(tmp_path, name, content):
    path = write(tmp_path, content, name)
    with pytest.raises(
        UserError, match=rf"{re.escape(name)} .*{re.escape(repr(content.split()[0]))[:-1]}"
    ):
        load_classes(EvalConfig(classes=path), "pets")


@pytest.mark.parametrize(
    "names",
    [("0", "1", "2"), ("2 cats", "3 cats"), ("a, b", "c"), ("'t Gooi", "cat"), ("1 finger",)],
)
def test_names_may_have_numbers_and_commas(tmp_path, names):
    path = write(tmp_path, "\n".join(names), "classes.txt")
    assert load_classes(EvalConfig(classes=path), "pets").names == names


def test_names_with_numbers_stand_in_json(tmp_path):
    assert load(tmp_path, ["1 finger", "2 fingers"]).names == ("1 finger", "2 fingers")


def test_the_placeholder_names_of_transformers_are_refused(tmp_path):
    with pytest.raises(UserError, match="LABEL_0"):
        load(tmp_path, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})


def test_lines_of_names_may_end_with_carriage_returns_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"cat\rdog\r")
    assert load_classes(EvalConfig(classes=f"{tmp_path}/a.txt"), "pets").names == ("cat", "dog")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_class_file_in_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("cat\ndog\n", encoding=encoding)
    with pytest.raises(UserError, match=r"a\.txt .*UTF-16"):
        load_classes(EvalConfig(classes=f"{tmp_path}/a.txt"), "pets")
