"""The digits of the demos: what their folder holds, and the files that go with it."""

import numpy as np
import pytest

from lit_jax.configs.demo import make_digits as digits
from lit_jax.configs.demo import make_text_files
from lit_jax.data.image import decode
from lit_jax.data.text import load_tokenizer, tokenize
from tests.digits import open_digits


@pytest.mark.parametrize(
    ("number", "words"),
    [(20, "twenty"), (42, "forty two"), (77, "seventy seven"), (99, "ninety nine")],
)
def test_number_words(number, words):
    assert digits.number_words(number) == words


@pytest.mark.parametrize(
    ("number", "words"), [(20, "zwanzig"), (31, "einunddreißig"), (42, "zweiundvierzig")]
)
def test_german_number_words(number, words):
    assert digits.number_words(number, "de") == words


def test_unseen_numbers_are_made_of_seen_digits():
    assert len(digits.UNSEEN) == 16
    assert set(digits.SEEN) | set(digits.UNSEEN) == set(range(20, 100))
    assert {n // 10 for n in digits.SEEN} == {n // 10 for n in digits.UNSEEN} == set(range(2, 10))
    assert {n % 10 for n in digits.SEEN} == {n % 10 for n in digits.UNSEEN} == set(range(10))


def test_no_scanned_digit_is_in_both_parts():
    train, test = (
        {image.tobytes() for group in digits.digit_images(part) for image in group}
        for part in ("train", "test")
    )
    assert not train & test
    assert len(train) + len(test) == 1797
    assert min(len(group) for group in digits.digit_images("test")) >= 30


@pytest.mark.parametrize("split", digits.SPLITS)
def test_a_split_shows_its_numbers_equally_often_and_captions_no_other(split):
    source = open_digits(split)
    examples = [source[i] for i in range(len(source))]
    labels, counts = np.unique([example["label"] for example in examples], return_counts=True)
    _, numbers, images_each, languages = digits.SPLITS[split]
    assert set(labels) == {digits.number_words(number) for number in numbers}
    assert set(counts) == {images_each}
    captions = {text for example in examples for text in example["captions"]}
    assert captions == {
        text for number in numbers for lang in languages for text in digits.captions(number, lang)
    }


def test_training_captions_no_unseen_number():
    for split in ("train", "bilingual"):
        assert not {*digits.UNSEEN} & {*digits.SPLITS[split][1]}


def test_parallel_sentences_say_the_same_and_have_no_image():
    source = open_digits("parallel", text_only=True)
    rows = [source[i] for i in range(len(source))]
    assert all(row["image"] is None for row in rows)
    assert {row["captions"] for row in rows} == {
        pair
        for number in digits.NUMBERS
        for pair in zip(digits.captions(number, "en"), digits.captions(number, "de"), strict=True)
    }
    assert all(row.get("teacher_caption") == row["captions"][0] for row in rows)


def test_images_are_those_that_are_drawn_and_differ_between_splits():
    drawn = digits.split_images("unseen")
    source = open_digits("unseen")
    for index in (0, 3, 799):
        np.testing.assert_array_equal(np.asarray(decode(source[index]["image"])), drawn[index])
    assert not np.array_equal(digits.split_images("seen")[:800], drawn)


def test_compose_keeps_each_digit_in_its_half():
    blank, full = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    for seed in range(20):
        image = digits.compose(blank, full, np.random.default_rng(seed))
        assert image.shape == (32, 32, 3)
        assert not image[:, :16].any()
        assert image[:, 16:].max() == 255


def test_committed_files_are_what_the_script_writes(demo_folder, tmp_path):
    make_text_files.write(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) == 23
    for name in made:
        assert (tmp_path / name).read_text() == (demo_folder / name).read_text(), (
            f"{name} is out of date: run python -m lit_jax.configs.demo.make_text_files"
        )


@pytest.mark.parametrize(
    ("folder", "languages"),
    [
        ("bert", ("en",)),
        ("align", ("en",)),
        ("clip", ("en",)),
        ("roberta", ("en",)),
        ("xlm_roberta", ("en", "de")),
    ],
)
def test_tokenizers_know_every_caption_and_can_spell_the_rest(demo_folder, folder, languages):
    tokenizer = load_tokenizer(demo_folder / folder, max_length=32)
    texts = [
        text for n in digits.NUMBERS for lang in languages for text in digits.captions(n, lang)
    ]
    tokens = tokenize(tokenizer, texts)
    assert tokens["attention_mask"].sum(axis=1).max() <= 13  # characters would take more
    last = tokens["attention_mask"].sum(axis=1) - 1
    text_ids = [ids[1:end] for ids, end in zip(tokens["input_ids"], last, strict=True)]
    spelt = tokenize(tokenizer, ["a zebra now"])["input_ids"][0]
    for ids in (*text_ids, spelt[1 : np.argmax(spelt == tokens["input_ids"][0][last[0]])]):
        assert tokenizer.unk_token_id not in ids
