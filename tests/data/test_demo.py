import importlib.util

import numpy as np
import pytest

from lit_jax.data import demo
from lit_jax.data.text import tokenize
from lit_jax.errors import UserError


@pytest.mark.parametrize(
    ("number", "words"),
    [(20, "twenty"), (42, "forty two"), (77, "seventy seven"), (99, "ninety nine")],
)
def test_number_words(number, words):
    assert demo.number_words(number) == words


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
    _, numbers, images_each = demo.SPLITS[split]
    assert set(labels) == {demo.number_words(n) for n in numbers}
    assert set(counts) == {images_each}


def test_unseen_numbers_are_never_captioned_in_training():
    source = demo.DemoSource("train")
    captions = {text for i in range(len(source)) for text in source[i]["captions"]}
    assert len(captions) == len(demo.SEEN) * len(demo.CAPTIONS)
    for number in demo.UNSEEN:
        words = demo.number_words(number)
        assert not any(caption.format(words) in captions for caption in demo.CAPTIONS)


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
    with pytest.raises(UserError, match=r"'test'.*train, seen, unseen"):
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
    assert len(made) == 5
    for name in made:
        assert (tmp_path / name).read_text() == (demo_folder / name).read_text(), (
            f"{name} is out of date: run python {path}"
        )


def test_tokenizer_knows_every_caption_and_can_spell_the_rest(tokenizer):
    texts = [
        caption.format(demo.number_words(n)) for n in demo.NUMBERS for caption in demo.CAPTIONS
    ]
    tokens = tokenize(tokenizer, [*texts, "a zebra, really!"])
    assert tokenizer.unk_token_id not in tokens["input_ids"]
    assert tokens["input_ids"].shape[1] <= 24  # characters would take more
