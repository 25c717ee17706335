"""What is said of a run's texts before it starts: cut, unknown, the same."""

import logging
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_jax.config import SourceConfig
from lit_jax.data.mixture import Mixture
from lit_jax.data.sources import open_source
from lit_jax.data.text import load_tokenizer
from lit_jax.data.text_check import check_texts, sample_captions, text_statistics
from lit_jax.errors import UserError
from tests.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load(family, length=10):
        folder = tmp_path_factory.mktemp(family)
        write_tokenizer(family, folder)
        return load_tokenizer(folder, max_length=length, fixed_length=family == "siglip")

    return load


def test_shares_are_counted(load):
    texts = [
        "photo number",
        "photo",
        "photo " * 8,
        "photo " * 9,
        "photo " * 30,
        "☃ photo ☃",
        " photo ",
    ]
    found = text_statistics(load("bert"), texts)  # 8 words fit
    assert (found.texts, found.limit, found.longest) == (7, 10, 32)
    assert found.cut == 2 / 7
    assert found.tokens == 2 + 1 + 8 + 8 + 8 + 3 + 1
    assert found.unknown == pytest.approx(2 / 31)
    assert found.same == 3 / 7  # those of 8 words and more; blanks around a text are no difference


@pytest.mark.parametrize(
    ("texts", "same"),
    [
        (["A photo", "a  PHOTO ", "a photo", "a photo"], 0),  # of no interest to an uncased model
        (["caf\u00e9", "cafe\u0301", "number"], 0),  # one text in two forms
        (["mà", "má", "number", "photo"], 2 / 4),  # two words in Vietnamese
        (["a photo"] * 5 + ["number"] * 5, 0),  # captions that many images share
        (["☃", "☠", "☃"], 1),
    ],
)
def test_texts_are_the_same_only_where_they_say_different_things(load, texts, same):
    assert text_statistics(load("bert"), texts).same == same


@pytest.mark.parametrize("family", ["clip", "roberta", "siglip2", "modernbert"])
def test_a_tokenizer_of_bytes_knows_all_texts(load, family):
    assert text_statistics(load(family, 40), ["☃ 犬", "ж"]).unknown == 0


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "siglip", "phobert", "t5", "camembert"])
def test_texts_of_unknown_tokens_alone_are_refused(load, family):
    tokenizer = load(family)
    unknown = ["ฉัน ☃ ☃", "☃ ฌ"]
    with pytest.raises(UserError, match=r"config\.data"):
        check_texts(tokenizer, unknown, "config.data")
    assert text_statistics(tokenizer, [*unknown, "a"]).unknown < 1


def test_one_line_says_it_and_warns_above_five_percent(load, caplog):
    caplog.set_level(logging.INFO, "lit_jax")
    tokenizer = load("bert")
    letters = "abcdefghijklmnopqrst"
    check_texts(tokenizer, [f"{a} {b}" for a in letters for b in letters], "config.data")
    check_texts(tokenizer, [f"{a} {b}" for a in letters for b in letters + "☃☠"], "zero_shot/x")
    check_texts(tokenizer, [], "nothing")
    fine, bad = caplog.records
    assert (fine.levelno, bad.levelno) == (logging.INFO, logging.WARNING)
    assert "400 texts of config.data: 0.0 % are cut at 10 tokens" in fine.getMessage()
    assert "440 texts of zero_shot/x" in bad.getMessage()
    assert "4.5 % of the tokens" in bad.getMessage()
    assert "9.1 % of the texts" in bad.getMessage()


def test_captions_that_are_all_one_text_are_told(load, caplog):
    tokenizer = load("bert")
    for texts, is_told in ((["a photo", "A  photo"], True), (["a photo", "photo"], False)):
        caplog.clear()
        check_texts(tokenizer, texts, "config.data")
        assert ("all of them are one text, 'a photo'" in caplog.text) == is_told
    caplog.clear()
    check_texts(tokenizer, ["a photo"], "config.data")
    assert "one text" not in caplog.text


class Captions:
    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return {"key": str(index), "image": None, "captions": (f"n{index}",), "label": None}


@pytest.mark.parametrize("count", [1, 7, 126, 999, 1000, 1001, 50_000])
def test_a_sample_is_spread_over_the_source_and_reads_neighbours(count):
    source = Captions(count)
    captions, teacher = sample_captions(source)
    assert captions == teacher == sample_captions(Captions(count))[0]
    assert len(set(captions)) == len(captions) == min(count, 1000)
    positions = np.sort(source.read)
    assert (positions[0], positions[-1]) == (0, count - 1)
    assert (np.diff(positions) > 1).sum() <= 7


def test_a_small_part_of_a_mixture_is_sampled_too():
    mixture = Mixture({"large": Captions(100_000), "small": Captions(40)}, {})
    captions, _ = sample_captions(mixture)
    assert len(captions) == 540


def test_few_row_groups_are_read_and_no_image_decoded(tmp_path, load):
    rows = {"image": [b"not an image" * 500] * 30_000, "caption": [f"n {i}" for i in range(30_000)]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=300)
    source = open_source(SourceConfig(path=str(tmp_path)))
    start = time.process_time()
    captions, _ = sample_captions(source)
    assert len(captions) == 1000
    assert len(source._cache._tables) <= 16
    assert time.process_time() - start < 5
