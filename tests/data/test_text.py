import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.data.text import check_vocabulary, load_tokenizer, tokenize
from lit_jax.errors import UserError

LONG = "the number forty two " * 20


def test_arrays_are_int32_and_of_the_asked_length(tokenizer):
    tokens = tokenize(tokenizer, ["forty two", "ninety"], length=24)
    assert set(tokens) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(a.shape == (2, 24) and a.dtype == np.int32 for a in tokens.values())
    cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    ninety = tokenizer.convert_tokens_to_ids("ninety")
    assert tokens["input_ids"][1].tolist() == [cls, ninety, sep] + [pad] * 21
    assert tokens["attention_mask"][1].tolist() == [1, 1, 1] + [0] * 21


def test_truncation_keeps_the_last_special_token(tokenizer):
    ids = tokenize(tokenizer, [LONG], length=24)["input_ids"][0]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id


def test_length_of_an_evaluation_is_a_multiple_of_8_up_to_the_maximum(demo_folder, tokenizer):
    assert tokenize(tokenizer, ["ninety"])["input_ids"].shape == (1, 8)
    assert tokenize(tokenizer, ["ninety", "the " * 7])["input_ids"].shape == (2, 16)
    odd = load_tokenizer(demo_folder / "bert", max_length=21)
    assert tokenize(odd, [LONG])["input_ids"].shape == (1, 21)


def test_a_model_without_attention_mask_gets_none_and_all_the_padding(demo_folder):
    tokenizer = load_tokenizer(demo_folder / "bert", max_length=24)
    tokenizer.model_input_names = ["input_ids"]  # as that of SigLIP
    tokens = tokenize(tokenizer, ["ninety"])
    assert {name: array.shape for name, array in tokens.items()} == {"input_ids": (1, 24)}


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_gets_the_same_tokens_whatever_comes_along(tokenizer, texts):
    together = tokenize(tokenizer, texts, length=24)
    for i, text in enumerate(texts):
        alone = tokenize(tokenizer, [text])
        n = alone["attention_mask"].sum()
        np.testing.assert_array_equal(alone["input_ids"][0, :n], together["input_ids"][i, :n])
        assert together["attention_mask"][i].sum() == n


def test_threads_can_share_a_tokenizer(demo_folder):
    tokenizer = load_tokenizer(demo_folder / "bert", max_length=24)
    lengths = [None, 24] * 100
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: tokenize(tokenizer, ["ninety"] * 8, length=n), lengths))
    assert {r["input_ids"].shape[1] for r in results[::2]} == {8}
    assert {r["input_ids"].shape[1] for r in results[1::2]} == {24}


def test_a_folder_without_vocabulary_is_refused(tmp_path, demo_folder):
    shutil.copy(demo_folder / "bert/config.json", tmp_path)
    with pytest.raises(UserError, match=r"vocab\.txt"):
        load_tokenizer(tmp_path, max_length=8)


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(tmp_path, demo_folder, broken):
    shutil.copytree(demo_folder / "bert", tmp_path, dirs_exist_ok=True)
    (tmp_path / broken).write_text("{")
    with pytest.raises(UserError, match=rf"{tmp_path}"):
        load_tokenizer(tmp_path, max_length=8)


def test_a_tokenizer_without_unknown_token_is_refused(tmp_path, demo_folder):
    shutil.copytree(demo_folder / "bert", tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.txt").write_text("a\nnumber\nforty\ntwo\n")
    with pytest.raises(UserError, match=r"\[UNK\]"):
        load_tokenizer(tmp_path, max_length=8)


def test_a_length_without_room_for_words_is_refused(demo_folder):
    with pytest.raises(UserError, match=r"max_text_length=2 .*2"):
        load_tokenizer(demo_folder / "bert", max_length=2)


def test_half_a_surrogate_pair_is_an_unknown_character(tokenizer):
    cut, replaced = "forty \ud83d", "forty \ufffd"  # json.loads gives the first of a cut emoji
    tokens = tokenize(tokenizer, [cut, replaced, "forty 😀"])["input_ids"]
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path, demo_folder):
    shutil.copytree(demo_folder / "bert", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    with pytest.raises(UserError, match="pad_token"):
        load_tokenizer(tmp_path, max_length=8)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer), "config.model.text.model")
    with pytest.raises(UserError, match=r"\d+ .*config\.model\.text\.model"):
        check_vocabulary(tokenizer, len(tokenizer) - 1, "config.model.text.model")


@pytest.mark.parametrize("quiet", ["import lit_jax", ""])
def test_lit_jax_without_pytorch_is_nothing_to_warn_about(demo_folder, quiet):
    code = f"""if True:
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: name != "torch" and find_spec(name, *rest) or None
        {quiet}
        import transformers
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(demo_folder.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("PyTorch was not found" in result.stderr) == (not quiet)
