"""Ranks against a brute-force count, ties included."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.config import MeshConfig, SourceConfig
from lit_jax.data.sources import open_source
from lit_jax.distributed.mesh import make_mesh
from lit_jax.errors import UserError
from lit_jax.evals.ranks import CHUNK, chunk_size, count_ahead, ranks
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


def mesh_of(devices: int):
    return make_mesh(MeshConfig(), jax.devices()[:devices])


@st.composite
def problems(draw):
    """Small whole numbers, so that scores are exact and ties are common; some images have no text."""
    images, width = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    image_of_text = draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=20))
    entries = st.integers(-2, 2)

    def rows(count):
        numbers = draw(st.lists(entries, min_size=count * width, max_size=count * width))
        return np.array(numbers, np.float32).reshape(count, width)

    return rows(images), rows(len(image_of_text)), np.array(image_of_text)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_matches_brute_force(devices):
    """With chunks so small that images and texts take several, on one device and on many."""

    @given(problems())
    @settings(max_examples=40)
    def check(problem):
        actual = ranks(*problem, mesh_of(devices), block=4, chunk=8)
        assert tuple(map(list, actual)) == brute_force_ranks(*problem)

    check()


def test_the_metrics_are_those_of_the_ranks():
    images, texts, of = unit_rows(40, 3), unit_rows(90, 3), RANDOM.integers(0, 30, 90)
    metrics = retrieval(images, texts, of, mesh_of(2))
    expected = brute_force_ranks(images, texts, of)
    for direction, found in zip(("image_to_text", "text_to_image"), expected, strict=True):
        for k in (1, 5, 10):
            recall = sum(rank <= k for rank in found) / len(found)
            assert metrics.pop(f"{direction}_recall_at_{k}") == pytest.approx(recall)
        assert metrics.pop(f"{direction}_mean_rank") == pytest.approx(sum(found) / len(found))
        assert metrics.pop(f"{direction}_median_rank") == np.median(found)
    assert metrics == {"images": len(set(of.tolist())), "texts": 90}


@pytest.mark.parametrize("width", [5, 64, 768])
def test_copies_tie_wherever_they_stand(width):
    """Real numbers, whose products are rounded: copies must have the same score in every block."""
    originals = unit_rows(100, width)
    of = RANDOM.permutation(np.repeat(np.arange(100), 7))
    images, texts = originals[of], unit_rows(100, width)[of]
    found = ranks(images, texts, np.arange(700), mesh_of(8), block=32)
    scores = originals.astype(np.float64) @ texts[np.unique(of, return_index=True)[1]].T
    above = (scores > np.diagonal(scores)[:, None]).sum(1)
    np.testing.assert_array_equal(found.of_images, 7 * (above[of] + 1))
    above = (scores > np.diagonal(scores)[None, :]).sum(0)
    np.testing.assert_array_equal(found.of_texts, 7 * (above[of] + 1))


def test_a_million_by_a_million_is_never_a_matrix():
    """As one program, of which `ranks` runs smaller ones, the compiler wants 20 MiB; a matrix is 4 TB."""
    million, width, devices = 123 * 8192, 64, 8
    rows, scores, index = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((million, width), jnp.float32),
            ((million,), jnp.float32),
            ((million,), jnp.int32),
        ]
    )
    sides = (rows, scores, index) * 2
    compiled = count_ahead.lower(*sides, mesh=mesh_of(devices), block=1024).compile()
    counts = 4 * 2 * million
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * counts + 8 * 1024**2 * 4


@given(st.integers(1, 10**7), st.sampled_from([8, 1024, 1024 * 8, 1024 * 96]))
def test_chunks_cover_the_rows_with_little_for_nothing(count, multiple):
    size = chunk_size(count, multiple, CHUNK)
    chunks = -(-count // size)
    assert size % multiple == 0
    assert size <= max(CHUNK, multiple) * 9 / 8 + multiple
    assert chunks * size <= count * 9 / 8 + 2 * chunks * multiple


def test_chunks_have_few_sizes():
    """A program is compiled for each."""
    sizes = {chunk_size(count, 1024, CHUNK) for count in range(1, 10**6, 999)}
    assert len(sizes) <= 48


def test_a_perfect_model_finds_everything():
    images = unit_rows(50, 16)
    image_of_text = np.repeat(np.arange(50), 3)
    metrics = retrieval(images, images[image_of_text], image_of_text, mesh_of(8))
    assert metrics.pop("images") == 50
    assert metrics.pop("texts") == 150
    assert set(metrics.values()) == {1.0}


def test_a_random_model_finds_one_in_n():
    count = 2000
    metrics = retrieval(unit_rows(count, 64), unit_rows(count, 64), np.arange(count), mesh_of(8))
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_recall_at_10"] == pytest.approx(10 / count, abs=0.008)
        assert metrics[f"{direction}_median_rank"] == pytest.approx(count / 2, rel=0.1)


@pytest.mark.parametrize("value", [1.0, np.nan], ids=["constant", "nan"])
def test_a_model_that_tells_nothing_apart_finds_nothing(value):
    embeds = np.full((20, 4), value, np.float32)
    metrics = retrieval(embeds, embeds, np.arange(20), mesh_of(8))
    assert metrics["image_to_text_recall_at_10"] == metrics["text_to_image_recall_at_10"] == 0
    assert metrics["image_to_text_median_rank"] == metrics["text_to_image_median_rank"] == 20


def test_evaluate_leaves_out_bad_images_with_their_captions(encoder, params, pictures_with_bad):
    captions = captions_of(pictures_with_bad)
    result = evaluate_retrieval(encoder, params, pictures_with_bad, captions)
    metrics = result.metrics
    assert result.texts[8] == "number 5"
    assert result.image_of_text[8] == 4
    assert result.index[4] == 5
    assert (metrics["images"], metrics["texts"]) == (20, 40)

    kept = type(pictures_with_bad)(pictures_with_bad[:4] + pictures_with_bad[5:])
    images, _ = encoder.images(params, kept)
    texts = encoder.texts(params, [text for example in kept for text in example["captions"]])
    assert metrics == retrieval(images, texts, np.repeat(np.arange(20), 2), encoder.mesh)


def test_images_without_a_caption_are_counted_and_named(pictures, tmp_path, caplog):
    captions_of(pictures)
    assert not caplog.text
    rows = [
        {**example, "captions": ()} if i == 3 else example for i, example in enumerate(pictures)
    ]
    captions_of(type(pictures)(rows))
    assert f"1 of {len(rows)} images" in caplog.text
    assert f"example {rows[3]['key']}" in caplog.text
    assert "language" not in caplog.text

    in_german = {"de": ["eins"], "en": ["one"]}
    lines = [
        {"image": "a.jpg", "captions": in_german},
        {"image": "b.jpg", "captions": {"en": ["two"]}},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions_of(open_source(SourceConfig(path=str(tmp_path), languages={"de": 1.0})), "de")
    assert re.search(r"1 of 2 images .*'de'.* b\.jpg", caplog.text)


def test_one_image_has_no_other_to_be_confused_with(pictures, caplog):
    captions_of(type(pictures)(pictures[:1]))
    assert re.search(rf"one image, {re.escape(pictures[0]['key'])},", caplog.text)


def test_captions_are_needed(pictures):
    blank = type(pictures)({**example, "captions": (" ",)} for example in pictures)
    with pytest.raises(UserError, match=r"caption_key .*--classes"):
        captions_of(blank)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            b"a.jpg,one,two\nb.jpg\n",
            r"\b2 .*\b2 .*3 fields .*2 columns",
        ),
        ("a.jpg,Käfer\n".encode("latin-1"), r"1 .*1 .*UTF-8"),
        (b"https://a.b/c.jpg,one\nb.jpg,\n", r"\b1 .*\b2 .*\b1 .*img2dataset"),
    ],
)
def test_rows_that_are_all_bad_are_told_by_the_first_reason(tmp_path, rows, message):
    (tmp_path / "pairs.csv").write_bytes(b"image,caption\n" + rows)
    with pytest.raises(UserError, match=message):
        captions_of(open_source(SourceConfig(path=str(tmp_path))))


def test_a_caption_of_a_bad_image_alone_is_nothing_to_look_for(encoder, params, pictures_with_bad):
    source = type(pictures_with_bad)(
        {**example, "captions": example["captions"] if example["key"] == "bad" else ()}
        for example in pictures_with_bad
    )
    with pytest.raises(UserError, match="--data"):
        evaluate_retrieval(encoder, params, source, captions_of(source))
