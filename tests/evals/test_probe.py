"""Linear probes on known data, against scikit-learn used directly."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from lit_jax.errors import UserError
from lit_jax.evals.labels import Labels
from lit_jax.evals.probe import Features, check_counts, class_ids, features, few_shot, linear_probe


@pytest.fixture(scope="module")
def digits():
    """500 scans to learn from and 300 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    rows, labels = np.float32(pixels[:800] / 16), labels[:800].astype(np.int32)
    whole = Features(rows=rows, label=labels)
    return whole[:500], whole[500:]


def test_a_probe_is_a_regression_with_the_penalty_that_validates_best(digits):
    train, test = digits
    metrics = linear_probe(train, test)
    direct = LogisticRegression(C=1 / metrics["l2"], max_iter=1000).fit(train.rows, train.label)
    assert metrics["top1"] == pytest.approx(direct.score(test.rows, test.label))
    assert metrics["n"] == 300
    assert metrics["top1"] > 0.85
    assert metrics["top5"] > 0.98
    worst = [
        LogisticRegression(C=c, max_iter=1000).fit(train.rows, train.label) for c in (1e-6, 1e-3)
    ]
    assert all(w.score(test.rows, test.label) < metrics["top1"] for w in worst)


def test_more_shots_are_better_and_draws_are_always_the_same(digits):
    train, test = digits
    metrics = few_shot(train, test, shots=(1, 8, 32), draws=2)
    assert 0.25 < metrics["top1_1_shot"] < metrics["top1_8_shot"] < metrics["top1_32_shot"]
    assert metrics["top1_1_shot_std"] > 0
    again = few_shot(train, test, shots=(1, 8), draws=2)
    assert again == {name: metrics[name] for name in again}


def test_final_classifiers_that_have_not_converged_are_told_once(digits, caplog, monkeypatch):
    train, test = digits
    for fit, told in (
        (
            lambda: linear_probe(train, test),
            "1 of the 1 final classifiers of a probe, on up to 500 ",
        ),
        (lambda: few_shot(train, test, shots=(2, 8), draws=2), "4 of the 4 .* up to 80 images"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("lit_jax.evals.probe.MAX_ITERATIONS", 2)
            fit()
        (record,) = caplog.records
        assert re.search(told, record.getMessage())
        assert "after 2 iterations" in record.getMessage()
        caplog.clear()
    few_shot(train, test, shots=(2,), draws=1)
    assert not caplog.records


def test_two_classes_have_one_score(digits):
    train, test = (part[part.label < 2] for part in digits)
    assert linear_probe(train, test)["top1"] > 0.97


def test_features_are_what_the_tower_has_pooled(encoder, params, pictures_with_bad):
    label_N = np.arange(21, dtype=np.int32)
    got = features(encoder, params, pictures_with_bad, label_N)
    assert got.label.tolist() == [*range(4), *range(5, 21)]
    transform = encoder.image_transform
    pixels = transform.normalization(transform.eval(pictures_with_bad[7]["image"])[None])
    apply = jax.jit(functools.partial(encoder.module.apply, method="image_features"))
    expected = apply({"params": params}, pixels)
    np.testing.assert_allclose(got.rows[6], expected[0], atol=1e-6)
    other = dataclasses.replace(encoder, batch_size=8)
    np.testing.assert_allclose(
        features(other, params, pictures_with_bad, label_N).rows, got.rows, atol=1e-6
    )


def test_too_few_images_or_classes(digits, pictures):
    train, test = digits
    few = Features(rows=train.rows[:4], label=np.array([0, 0, 1, 1], np.int32))
    with pytest.raises(UserError, match=r"\b5 .*few_shot"):
        linear_probe(few, test)
    with pytest.raises(UserError, match=r"\b2 .*shots .*\b4\b"):
        few_shot(few, test, shots=(1, 4), draws=1)
    only_a = type(pictures)(e for e in pictures if e["label"] == "a")
    ab = type(pictures)(e for e in pictures if e["label"] != "c")
    with pytest.raises(UserError, match="--train_data"):
        check_counts(class_ids(Labels(only_a), Labels(only_a))[0])
    with pytest.raises(UserError, match=r"'c' .*\(picture2\)"):
        class_ids(Labels(ab), Labels(pictures))


def test_features_that_tell_nothing_apart_score_as_chance(digits):
    train, test = (part[part.label < 8] for part in digits)
    blind = [dataclasses.replace(part, rows=np.zeros_like(part.rows)) for part in (train, test)]
    # Equally many of each class, so that the classifier has no favourite.
    chosen = np.concatenate([np.flatnonzero(train.label == label)[:20] for label in range(8)])
    metrics = few_shot(blind[0][chosen], blind[1], shots=(20,), draws=1)
    assert metrics["top1_20_shot"] == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("kept", [[], ["a"]])
def test_too_few_images_that_can_be_decoded(encoder, params, pictures, kept):
    source = type(pictures)(
        e if e["label"] in kept else {**e, "image": b"bad"} for e in pictures[:9]
    )
    labels = Labels(source)
    label_N, _ = class_ids(labels, labels)
    if not kept:
        with pytest.raises(UserError, match=r"\b9 images"):
            features(encoder, params, source, label_N)
        return
    learn = features(encoder, params, source, label_N)
    for measure in (linear_probe, lambda *parts: few_shot(*parts, shots=(1,), draws=1)):
        with pytest.raises(UserError, match="--train_data"):
            measure(learn, learn)
    with pytest.raises(UserError, match="--data"):
        features(encoder, params, source, np.where(label_N == 0, -1, label_N))
