"""Ranks against a brute-force count, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.evals.retrieval import captions_of, evaluate_retrieval, retrieval

RANDOM = np.random.default_rng(0)


def unit_rows(count: int, width: int) -> np.ndarray:
    rows = RANDOM.normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force_ranks(images, texts, image_of_text) -> tuple[list[int], list[int]]:
    """Ranks by definition, one pair of scores at a time."""
    image_ranks, text_ranks = [], []
    for i, image in enumerate(images):
        own = [image @ text for text, of in zip(texts, image_of_text, strict=True) if of == i]
        others = [image @ text for text, of in zip(texts, image_of_text, strict=True) if of != i]
        if own:
            image_ranks.append(1 + sum(score >= max(own) for score in others))
    for text, of in zip(texts, image_of_text, strict=True):
        others = [text @ image for i, image in enumerate(images) if i != of]
        text_ranks.append(1 + sum(score >= text @ images[of] for score in others))
    return image_ranks, text_ranks


def metrics_of(direction: str, ranks: list[int]) -> dict[str, float]:
    recalls = {k: sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    named = {f"{direction}_recall_at_{k}": recall for k, recall in recalls.items()}
    return named | {f"{direction}_median_rank": np.median(ranks)}


@st.composite
def problems(draw):
    """Small whole numbers, so that scores are exact and ties are common; some images have no text."""
    images, width = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    image_of_text = draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=20))
    entries = st.integers(-2, 2)
    rows = lambda count: np.array(  # noqa: E731
        draw(st.lists(entries, min_size=count * width, max_size=count * width)), np.float32
    ).reshape(count, width)
    return rows(images), rows(len(image_of_text)), np.array(image_of_text), draw(st.integers(1, 25))


@given(problems())
@settings(deadline=None)
def test_matches_brute_force(problem):
    images, texts, image_of_text, block = problem
    image_ranks, text_ranks = brute_force_ranks(images, texts, image_of_text)
    expected = {
        **metrics_of("image_to_text", image_ranks),
        **metrics_of("text_to_image", text_ranks),
        "images": len(image_ranks),
        "texts": len(text_ranks),
    }
    assert retrieval(images, texts, image_of_text, block=block) == pytest.approx(expected)


def test_a_perfect_model_finds_everything():
    images = unit_rows(50, 16)
    image_of_text = np.repeat(np.arange(50), 3)
    metrics = retrieval(images, images[image_of_text], image_of_text)
    assert metrics.pop("images") == 50
    assert metrics.pop("texts") == 150
    assert set(metrics.values()) == {1.0}


def test_a_random_model_finds_one_in_n():
    count = 2000
    metrics = retrieval(unit_rows(count, 64), unit_rows(count, 64), np.arange(count))
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_recall_at_10"] == pytest.approx(10 / count, abs=0.008)
        assert metrics[f"{direction}_median_rank"] == pytest.approx(count / 2, rel=0.1)


@pytest.mark.parametrize("value", [1.0, np.nan], ids=["constant", "nan"])
def test_a_model_that_tells_nothing_apart_finds_nothing(value):
    embeds = np.full((20, 4), value, np.float32)
    metrics = retrieval(embeds, embeds, np.arange(20))
    assert metrics["image_to_text_recall_at_10"] == metrics["text_to_image_recall_at_10"] == 0
    assert metrics["image_to_text_median_rank"] == metrics["text_to_image_median_rank"] == 20


def test_evaluate_leaves_out_bad_images_with_their_captions(encoder, params, pictures_with_bad):
    captions = captions_of(pictures_with_bad)
    metrics = evaluate_retrieval(encoder, params, pictures_with_bad, captions)
    assert (metrics["images"], metrics["texts"]) == (20, 40)

    kept = type(pictures_with_bad)(pictures_with_bad[:4] + pictures_with_bad[5:])
    images, _ = encoder.images(params, kept)
    texts = encoder.texts(params, [text for example in kept for text in example["captions"]])
    assert metrics == retrieval(images, texts, np.repeat(np.arange(20), 2))


def test_captions_are_needed(pictures):
    blank = type(pictures)({**example, "captions": (" ",)} for example in pictures)
    with pytest.raises(UserError, match="no example has one"):
        captions_of(blank)


def test_a_caption_of_a_bad_image_alone_is_nothing_to_look_for(encoder, params, pictures_with_bad):
    source = type(pictures_with_bad)(
        {**example, "captions": example["captions"] if example["key"] == "bad" else ()}
        for example in pictures_with_bad
    )
    with pytest.raises(UserError, match="No image with a caption can be decoded"):
        evaluate_retrieval(encoder, params, source, captions_of(source))
