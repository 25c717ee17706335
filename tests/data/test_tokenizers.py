"""Every text family's tokenizer with its real class: read, shared, saved, and given texts of any length."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, Siglip2Tokenizer

from lit_jax.data.image_processor import load_processor
from lit_jax.data.text import check_saved, load_tokenizer, save_tokenizer, token_ids, tokenize
from lit_jax.errors import UserError
from tests.tokenizer_files import FAMILIES, TEXTS, write_tokenizer

LENGTH = 16
SIGLIP = ("siglip", "siglip2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family's tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family in FAMILIES:
        write_tokenizer(family, root / family)
    return {family: root / family for family in FAMILIES}


def load(folder, family, **options):
    return load_tokenizer(folder, max_length=LENGTH, fixed_length=family in SIGLIP, **options)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, np.array(theirs[name]), err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_gives_the_same_ids_here_saved_and_in_another_process(
    folders, family, tmp_path
):
    tokenizer = load(folders[family], family)
    ours = tokenize(tokenizer, TEXTS, length=LENGTH)
    padded = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    theirs = AutoTokenizer.from_pretrained(folders[family])(TEXTS, padding_side="right", **padded)
    assert_same(ours, theirs)
    assert len(np.unique(ours["input_ids"], axis=0)) > 3  # not all unknown

    save_tokenizer(tokenizer, tmp_path)
    kind = {"model_type": "vision-text-dual-encoder", "vision_config": {"model_type": "vit"}}
    config = json.loads((folders[family] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kind | {"text_config": config}))
    check_saved(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == LENGTH
    assert_same(ours, again(TEXTS, padding="max_length", truncation=True))
    assert_same(ours, tokenize(pickle.loads(pickle.dumps(tokenizer)), TEXTS, length=LENGTH))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: tokenize(tokenizer, TEXTS, length=LENGTH), range(12)):
            assert_same(ours, found)


MANY = 3000
LONG = {
    "words": "a photo of the number " * (MANY // 20),
    "blanks": "two" + " " * MANY + "photo of a dog",
    "line breaks": "\n\t" * MANY + "photo",
    "one word": "x" * MANY + " photo",
    "spelt words": ("x" * 90 + " ") * (MANY // 90),
    "no blanks": "犬が公園を走る" * (MANY // 7),
    "accents": "e\u0301" * MANY + " photo",
    "controls": "\u0000\u200d" * MANY + "photo",
    "emojis": "😀" * MANY + " photo",
    "marks": "." * MANY + " photo",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_has_the_tokens_of_the_whole_text(folders, family, monkeypatch):
    tokenizer = load(folders[family], family)
    found = tokenize(tokenizer, [*LONG.values()], length=LENGTH)
    starts = [len(ids) for ids in token_ids(tokenizer, [*LONG.values()])]
    monkeypatch.setattr("lit_jax.data.text.CHARACTERS_PER_TOKEN", 10 * MANY)
    assert_same(found, tokenize(tokenizer, [*LONG.values()], length=LENGTH))
    wholes = [len(ids) for ids in token_ids(tokenizer, [*LONG.values()])]
    # Of texts that have more tokens than are kept, only a start was tokenized.
    assert sum(start < whole for start, whole in zip(starts, wholes, strict=True)) >= 2
    assert all(n == m or n > LENGTH for n, m in zip(starts, wholes, strict=True))


def test_all_token_ids_are_those_of_an_uncut_text(folders):
    for family in ("bert", "clip", "siglip", "siglip2", "phobert"):
        plain = AutoTokenizer.from_pretrained(folders[family])
        text = " ".join(TEXTS * 3)
        (ids,) = token_ids(load(folders[family], family), [text])
        assert ids == plain([text], add_special_tokens=False)["input_ids"][0], family
        assert len(ids) > 3 * LENGTH


def test_all_token_ids_are_in_the_order_of_the_text_where_its_start_is_cut(folders):
    tokenizer = load(folders["bert"], "bert")
    expected = token_ids(tokenizer, [" ".join(TEXTS * 3)])
    tokenizer.truncation_side = "left"
    assert token_ids(tokenizer, [" ".join(TEXTS * 3)]) == expected


def test_a_tower_with_a_mask_gets_one_whatever_the_tokenizer_names(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "bert")
    file = tmp_path / "bert" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | {"model_input_names": ["input_ids"]}))
    tokens = tokenize(load(tmp_path / "bert", "bert"), ["a dog", "a dog and a cat and a dog"])
    assert tokens.keys() == {"input_ids", "attention_mask"}
    assert tokens["attention_mask"][0].sum() < tokens["attention_mask"][1].sum()


def siglip2_ids(folder, texts):
    tokenizer = Siglip2Tokenizer.from_pretrained(folder, padding_side="right")
    padded = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    return tokenizer(texts, **padded)["input_ids"]


def test_siglip_2_gets_lower_case_letters_as_its_own_tokenizer_makes_them(folders, tmp_path):
    """Among others ẞ, a Turkish capital and a sigma at the end of a word."""
    texts = [*TEXTS, *map(str.upper, TEXTS), "A  Photo"]
    expected = siglip2_ids(folders["siglip2"], texts)
    ours = load(folders["siglip2"], "siglip2", lowercase=None)
    assert_same({"input_ids": expected}, tokenize(ours, texts, length=LENGTH))
    as_it_is = load(folders["siglip2"], "siglip2", lowercase=False)
    assert not np.array_equal(expected, tokenize(as_it_is, texts, length=LENGTH)["input_ids"])
    for name, tokenizer in (("lower", ours), ("as it is", as_it_is)):
        save_tokenizer(tokenizer, tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "siglip"}')
        check_saved(tokenizer, tmp_path / name)
        again = load(tmp_path / name, "siglip2", lowercase=None)  # as evaluate reads it
        assert_same(tokenize(tokenizer, texts), tokenize(again, texts))
    steps = json.loads((tmp_path / "lower/tokenizer.json").read_text())["normalizer"]
    assert [step["type"] for step in steps["normalizers"]] == ["Lowercase", "Replace"]


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "siglip", "roberta"])
def test_no_other_tokenizer_loses_its_capitals_unless_the_config_says_so(folders, family, tmp_path):
    as_it_is, decided = load(folders[family], family), load(folders[family], family, lowercase=None)
    assert_same(tokenize(as_it_is, TEXTS), tokenize(decided, TEXTS))
    lower = load(folders[family], family, lowercase=True)
    small = "hello, world! it's a dog."
    assert_same(tokenize(lower, ["Hello, World! It's a DOG."]), tokenize(as_it_is, [small]))


def test_a_tokenizer_in_python_cannot_be_given_lower_case_letters(folders):
    with pytest.raises(UserError, match=r"PhobertTokenizer.*config\.data\.lowercase"):
        load(folders["phobert"], "phobert", lowercase=True)


def test_a_tower_without_mask_gets_none_whatever_its_tokenizer_says(folders, tmp_path):
    shutil.copytree(folders["siglip"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    assert set(tokenize(load_tokenizer(tmp_path, max_length=8), TEXTS)) > {"attention_mask"}
    assert set(tokenize(load(tmp_path, "siglip"), TEXTS)) == {"input_ids"}


def test_a_tokenizer_that_does_not_read_back_what_it_saved_is_refused(folders, tmp_path):
    """As BERTweet's, whose files of merges are written in one way and read in another."""
    tokenizer = load(folders["bertweet"], "bertweet")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertweetTokenizer"):
        check_saved(tokenizer, tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("family", "file", "content", "message"),
    [
        ("xlm_roberta", "sentencepiece.bpe.model", LFS_POINTER, "git lfs pull"),
        ("siglip", "spiece.model", LFS_POINTER, "git lfs pull"),
        ("clip", "tokenizer.json", LFS_POINTER, "git lfs pull"),
        ("xlm_roberta", "sentencepiece.bpe.model", b"", "0 tokens"),
        ("camembert", "sentencepiece.bpe.model", b"", "3 tokens"),
        (
            "camembert",
            "sentencepiece.bpe.model",
            b"damaged",
            r"\(sentencepiece\.bpe\.model .*sentencepiece",
        ),
        ("phobert", "vocab.txt", b"", "0 tokens"),
    ],
)
def test_a_vocabulary_that_is_not_there_is_not_taken_for_an_empty_one(
    folders, tmp_path, family, file, content, message
):
    folder = shutil.copytree(folders[family], tmp_path / family)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load(folder, family)
    assert str(folder) in str(raised.value)


def test_bertweets_tokenizer_says_that_emojis_need_a_package(folders, tmp_path, caplog):
    shutil.copytree(folders["bertweet"], tmp_path, dirs_exist_ok=True)
    settings = {"tokenizer_class": "BertweetTokenizer", "normalization": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    caplog.set_level(logging.WARNING, "lit_jax")
    load_tokenizer(tmp_path, max_length=LENGTH)
    assert "pip install emoji" in caplog.text


MISSING = """
import importlib.util, sys
missing, folder = sys.argv[1:]
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == missing else find_spec(name, *rest)
class Finder:
    def find_spec(self, name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
from pathlib import Path
from lit_jax.data.text import load_tokenizer
from lit_jax.errors import UserError
try:
    load_tokenizer(Path(folder), max_length=16)
except UserError as error:
    print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "module", "package"),
    [
        ("siglip", "sentencepiece", "sentencepiece"),
        ("siglip", "google.protobuf", "protobuf"),
        ("xlm_roberta", "sentencepiece", "sentencepiece"),
        ("t5", "google.protobuf", "protobuf"),
    ],
)
def test_a_missing_package_is_named(folders, family, module, package):
    said = subprocess.run(
        [sys.executable, "-c", MISSING, module, str(folders[family])],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"pip install {package}" in said


def test_the_package_of_a_word_tokenizer_is_named(folders, tmp_path):
    shutil.copytree(folders["bert_japanese"], tmp_path, dirs_exist_ok=True)
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "sudachi"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"pip install sudachipy"):
        load_tokenizer(tmp_path, max_length=LENGTH)


@pytest.mark.parametrize("part", ["tokenizer", "image processor"])
@pytest.mark.parametrize("form", [["own.Own", None], "own.Own", "elsewhere/repository--own.Own"])
def test_code_in_the_folder_is_never_run(folders, tmp_path, monkeypatch, part, form):
    """Nor does anybody ask on the terminal, where `yes |` would answer."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(folders["bert"], folder)
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    if part == "tokenizer":
        code = form if isinstance(form, list) else [form, None]
        settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": code}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if isinstance(form, str):  # with it transformers looks for a class that it has
            (folder / "config.json").unlink()
    else:
        code = form[0] if isinstance(form, list) else form
        settings = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": code}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    read = {"tokenizer": lambda: load_tokenizer(folder, max_length=LENGTH)}
    read["image processor"] = lambda: load_processor(folder)
    with pytest.raises(UserError, match=rf"{part} .*{folder}"):
        read[part]()
    assert not marker.exists()
