"""Zero-shot classification against results known by hand or computed one by one."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.errors import UserError
from lit_jax.evals.classes import Classes
from lit_jax.evals.encode import Encoder
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.zero_shot import embed_classes, expected_hits, zero_shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedEncoder(Encoder):
    """Gives out planned embeddings: a model whose results are known."""

    image_embeds: np.ndarray
    valid: np.ndarray
    text_embeds: dict[str, np.ndarray]

    def images(self, params, source):
        return self.image_embeds, self.valid

    def texts(self, params, texts):
        return np.stack([self.text_embeds[text] for text in texts])


def plan(encoder: Encoder, image_embeds, text_embeds, valid=None) -> PlannedEncoder:
    fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    image_embeds = np.asarray(image_embeds, np.float32)
    valid = np.ones(len(image_embeds), bool) if valid is None else np.asarray(valid)
    text_embeds = {text: np.asarray(embed, np.float32) for text, embed in text_embeds.items()}
    return PlannedEncoder(**fields, image_embeds=image_embeds, valid=valid, text_embeds=text_embeds)


def test_class_embeddings_are_the_normalised_mean_over_templates(encoder, params):
    classes = Classes(names=("forty two", "seven"), templates=("{}", "a photo of {}", "number {}"))
    embeds_CxE = embed_classes(encoder, params, classes)
    for name, embed_E in zip(classes.names, embeds_CxE, strict=True):
        texts = [template.replace("{}", name) for template in classes.templates]
        each = [encoder.texts(params, [text])[0] for text in texts]
        mean_E = sum(each)
        np.testing.assert_allclose(embed_E, mean_E / np.linalg.norm(mean_E), atol=1e-6)


def test_a_class_may_have_sentences_of_its_own(encoder, params):
    prompts = (("one", "a one"), ("two",))
    embeds_CxE = embed_classes(encoder, params, Classes(names=("1", "2"), prompts=prompts))
    one_2xE, two_1xE = (encoder.texts(params, texts) for texts in prompts)
    mean_E = one_2xE.sum(axis=0)
    np.testing.assert_allclose(embeds_CxE[0], mean_E / np.linalg.norm(mean_E), atol=1e-6)
    np.testing.assert_allclose(embeds_CxE[1], two_1xE[0], atol=1e-6)


def test_metrics_by_hand(encoder, params, pictures):
    """Six classes along six axes; class "a" has four images, "b" has one, and one image is bad."""
    names = tuple("abcdef")
    classes = Classes(names=names, templates=("{}",))
    a, b, c, d, e, _ = np.eye(6)
    images = [
        a,  # "a": right
        0.8 * b + 0.6 * a,  # "a": second, so right among five
        5 * a + 4 * b + 3 * c + 2 * d + 1 * e,  # "f", which is last: wrong even among five
        a,  # cannot be decoded
        a + 0.5 * d,  # "a": right
        a,  # "b": wrong, ties for the second place
    ]
    label_N = np.array([0, 0, 5, 0, 0, 1], np.int32)
    planned = plan(
        encoder,
        images,
        dict(zip(names, np.eye(6), strict=True)),
        [True, True, True, False, True, True],
    )
    result = zero_shot(planned, params, type(pictures)(pictures[:6]), classes, label_N)
    assert result.index.tolist() == [0, 1, 2, 4, 5]
    assert result.label.tolist() == [0, 0, 5, 0, 1]
    assert result.top[:, 0].tolist() == [0, 1, 0, 0, 0]
    assert result.top[2].tolist() == [0, 1, 2, 3, 4]
    assert result.metrics["n"] == 5
    assert result.metrics["top1"] == pytest.approx(2 / 5)
    assert result.metrics["mean_per_class_recall"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert result.confusion().tolist() == [[0, 0, 2], [0, 1, 1], [1, 0, 1], [5, 0, 1]]
    assert result.hit.tolist() == [1, 0, 0, 1, 0]
    assert not result.is_tied.any()


def test_a_perfect_model_is_always_right(encoder, params, pictures):
    classes = Classes(names=("a", "b", "c"), templates=("{}",))
    label_N = label_ids(Labels(pictures), classes)
    planned = plan(encoder, np.eye(3)[label_N], dict(zip("abc", np.eye(3), strict=True)))
    result = zero_shot(planned, params, pictures, classes, label_N)
    assert result.metrics == {"top1": 1.0, "mean_per_class_recall": 1.0, "n": 21.0}  # no top5


def test_predictions_match_logits_computed_one_by_one(encoder, params, pictures):
    classes = Classes(names=("a", "b", "c", "d", "e", "f", "g"), templates=("the number {}", "{}"))
    result = zero_shot(encoder, params, pictures, classes, label_ids(Labels(pictures), classes))
    scale = np.exp(float(params["logit_scale"]))
    images_NxE, _ = encoder.images(params, pictures)
    for image_E, top, probability in zip(images_NxE, result.top, result.probability, strict=True):
        logits_C = scale * (embed_classes(encoder, params, classes) @ image_E)
        softmax_C = np.exp(logits_C) / np.exp(logits_C).sum()
        assert top.tolist() == np.argsort(-logits_C)[:5].tolist()
        np.testing.assert_allclose(probability, softmax_C[top], rtol=1e-4)
    assert set(result.metrics) == {"top1", "top5", "mean_per_class_recall", "n"}


@pytest.mark.parametrize("width", [3, 8, 33])
def test_classes_of_one_name_share_their_hits(encoder, params, pictures, width):
    """Whatever their places among others, as if chance decided."""
    names = (*(f"n{i}" for i in range(20)), "crane", *(f"m{i}" for i in range(40)), "crane")
    vectors = {name: np.random.default_rng(i).normal(size=width) for i, name in enumerate(names)}
    label_N = np.array([names.index("crane")] * 3 + [len(names) - 1], np.int32)
    planned = plan(encoder, [vectors["crane"]] * 4, vectors)
    classes = Classes(names=names, templates=("{}",))
    result = zero_shot(planned, params, type(pictures)(pictures[:4]), classes, label_N)
    expected = {"top1": 0.5, "top5": 1.0, "mean_per_class_recall": 0.5, "n": 4.0}
    assert result.metrics == expected


@given(st.data())
def test_expected_hits_are_the_mean_over_all_orders_of_ties(data):
    classes = data.draw(st.integers(1, 7))
    scores_bxC = np.array(
        [data.draw(st.lists(st.integers(0, 2), min_size=classes, max_size=classes))]
    )
    scores_bxC = scores_bxC.astype(np.float32)
    label = data.draw(st.integers(0, classes - 1))
    hits = np.zeros(2)
    orders = [*itertools.permutations(range(classes))]
    for order in orders:
        place = sorted(order, key=lambda c: -scores_bxC[0, c]).index(label)
        hits += [place < 1, place < 5]
    found = expected_hits(scores_bxC, np.array([label]))
    np.testing.assert_allclose(found[0], hits / len(orders))


def test_images_without_a_label_alone_are_nothing_to_classify(encoder, params, pictures):
    planned = plan(
        encoder, np.eye(3), dict(zip("abc", np.eye(3), strict=True)), [True, False, True]
    )
    classes, label_N = (
        Classes(names=tuple("abc"), templates=("{}",)),
        np.array([-1, 0, -1], np.int32),
    )
    with pytest.raises(UserError, match="--data"):
        zero_shot(planned, params, type(pictures)(pictures[:3]), classes, label_N)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 100.0])
def test_a_logit_scale_that_tells_no_classes_apart_is_an_error(encoder, params, pictures, value):
    classes = Classes(names=("a", "b", "c"), templates=("{}",))
    bad = {**params, "logit_scale": np.float32(value)}
    with pytest.raises(UserError, match=r"exp\("):
        zero_shot(encoder, bad, pictures, classes, label_ids(Labels(pictures), classes))
