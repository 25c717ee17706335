import importlib.util

import numpy as np
import pytest

from lit_jax.data import demo
from lit_jax.data.text import load_tokenizer, tokenize
from lit_jax.errors import UserError


@pytest.mark.parametrize(
    ("number", "words"),
    [(20, "twenty"), (42, "forty two"), (77, "seventy seven"), (99, "ninety nine")],
)
def test_number_words(number, words):
    assert demo.number_words(number) == words


@pytest.mark.parametrize(
    ("number", "words"), [(20, "zwanzig"), (31, "einunddreißig"), (42, "zweiundvierzig")]
)
def test_german_number_words(number, words):
    assert demo.number_words(number, "de") == words


def test_unseen_numbers_are_made_of_seen_digits():
    assert len(demo.UNSEEN) == 16
    assert set(demo.SEEN) | set(demo.UNSEEN) == set(range(20, 100))
    assert {n // 10 for n in demo.SEEN} == {n // 10 for n in demo.UNSEEN} == set(range(2, 10))
    assert {n % 10 for n in demo.SEEN} == {n % 10 for n in demo.UNSEEN} == set(range(10))


def test_no_scanned_digit_is_in_both_parts():
    train, test = (
        {image.tobytes() for group in demo.digit_images(part) for image in group}
        for part in ("train", "test")
    )
    assert not train & test
    assert len(train) + len(test) == 1797
    assert min(len(group) for group in demo.digit_images("test")) >= 30


@pytest.mark.parametrize("split", demo.SPLITS)
def test_split_shows_its_numbers_equally_often(split):
    source = demo.DemoSource(split)
    labels, counts = np.unique([source[i]["label"] for i in range(len(source))], return_counts=True)
    _, numbers, images_each, _ = demo.SPLITS[split]
    assert set(labels) == {demo.number_words(n) for n in numbers}
    assert set(counts) == {images_each}


def test_unseen_numbers_are_never_captioned_in_training():
    for split, languages in (("train", ("en",)), ("bilingual", ("en", "de"))):
        source = demo.DemoSource(split)
        captions = {text for i in range(len(source)) for text in source[i]["captions"]}
        sentences = sum(len(demo.CAPTIONS[language]) for language in languages)
        assert len(captions) == len(demo.SEEN) * sentences
        for number in demo.UNSEEN:
            for language in languages:
                assert not captions & set(demo.captions(number, language))


def test_parallel_sentences_say_the_same_and_have_no_image():
    source = demo.ParallelDemoSource()
    rows = [source[i] for i in range(len(source))]
    assert all(row["image"] is None for row in rows)
    assert {row["captions"] for row in rows} == {
        pair
        for number in demo.NUMBERS
        for pair in zip(demo.captions(number, "en"), demo.captions(number, "de"), strict=True)
    }
    assert all(row.get("teacher_caption") == row["captions"][0] for row in rows)


def test_images_are_always_the_same_and_differ_between_splits():
    before = demo.split_images("unseen").copy()
    demo.split_images.cache_clear()
    np.testing.assert_array_equal(demo.DemoSource("unseen")[3]["image"], before[3])
    assert not np.array_equal(demo.split_images("seen")[0], demo.split_images("train")[0])


def test_compose_keeps_each_digit_in_its_half():
    blank, full = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    for seed in range(20):
        image = demo.compose(blank, full, np.random.default_rng(seed))
        assert image.shape == (32, 32, 3)
        assert not image[:, :16].any()
        assert image[:, 16:].max() == 255


def test_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"'test'.*train, bilingual, seen, unseen.*parallel"):
        demo.DemoSource("test")


def test_committed_files_are_what_the_script_writes(demo_folder, tmp_path):
    path = demo_folder / "make_text_files.py"
    spec = importlib.util.spec_from_file_location("make_text_files", path)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) == 23
    for name in made:
        assert (tmp_path / name).read_text() == (demo_folder / name).read_text(), (
            f"{name} is out of date: run python {path}"
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
    texts = [text for n in demo.NUMBERS for lang in languages for text in demo.captions(n, lang)]
    tokens = tokenize(tokenizer, texts)
    assert tokens["attention_mask"].sum(axis=1).max() <= 13  # characters would take more
    last = tokens["attention_mask"].sum(axis=1) - 1
    text_ids = [ids[1:end] for ids, end in zip(tokens["input_ids"], last, strict=True)]
    spelt = tokenize(tokenizer, ["a zebra now"])["input_ids"][0]
    for ids in (*text_ids, spelt[1 : np.argmax(spelt == tokens["input_ids"][0][last[0]])]):
        assert tokenizer.unk_token_id not in ids
