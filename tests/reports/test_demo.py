"""The demo's pictures: what they state is true, and the files are there and legible in size."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from lit_jax.data.demo import NUMBERS, TEMPLATES, UNSEEN, DemoSource, number_words
from lit_jax.evals.classes import Classes
from lit_jax.evals.labels import Labels, label_ids
from lit_jax.evals.zero_shot import ZeroShotResult, zero_shot
from lit_jax.reports.demo import _accuracies, _first_predictions, _similarity, write_demo_report
from lit_jax.reports.figures import Accuracies, Prediction, loss_figure, predictions_figure

CLASSES = Classes(names=tuple(map(number_words, NUMBERS)), templates=TEMPLATES["en"][:1])
METRICS = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.0, "learning_rate": 5e-4},
    {"step": 2, "zero_shot/unseen16/top1": 0.5},
]


@pytest.fixture(scope="module")
def unseen_result(encoder, params):
    source = DemoSource("unseen")
    return zero_shot(encoder, params, source, CLASSES, label_ids(Labels(source), CLASSES))


def test_writes_three_pictures(encoder, params, tmp_path):
    encoder = dataclasses.replace(encoder, batch_size=256)
    write_demo_report(tmp_path / "report", encoder, params, METRICS)
    files = sorted((tmp_path / "report").iterdir())
    assert [file.name for file in files] == ["loss.png", "predictions.png", "similarity.png"]
    for file in files:
        assert file.stat().st_size < 500_000
        with Image.open(file) as picture:
            assert min(picture.size) >= 900


def test_shows_the_first_image_of_every_unseen_number(unseen_result):
    source = DemoSource("unseen")
    predictions = _first_predictions(source, unseen_result, CLASSES)
    assert [p.truth for p in predictions] == [number_words(number) for number in UNSEEN]
    labels = [source[i]["label"] for i in range(len(source))]
    for prediction in predictions:
        first = labels.index(prediction.truth)
        np.testing.assert_array_equal(prediction.image, source[first]["image"])
        best = CLASSES.names[unseen_result.top[first, 0]]
        assert prediction.guesses[0] == (best, pytest.approx(unseen_result.probability[first, 0]))
        assert len(prediction.guesses) == 3


def test_accuracies_and_similarity_are_means_over_a_class():
    axes = np.eye(4, dtype=np.float32)
    result = ZeroShotResult(
        metrics={},
        index=np.arange(4),
        label=np.array([0, 1, 1, 2]),
        top=np.array([[0], [1], [0], [0]]),
        probability=np.ones((4, 1)),
        image_embeds=axes,
        class_embeds=axes[:3],
    )
    np.testing.assert_array_equal(_accuracies([result]), [1, 0.5, 0])
    expected = [[1, 0, 0], [0, 0.5, 0.5], [0, 0, 0]]
    np.testing.assert_array_equal(_similarity([result]), expected)


def test_mean_accuracy_of_seen_and_unseen_numbers():
    accuracies = Accuracies(numbers=range(20, 30), unseen=(20, 29), accuracy=np.arange(10) / 10)
    assert accuracies.mean(unseen=True) == pytest.approx(0.45)
    assert accuracies.mean(unseen=False) == pytest.approx(0.45)
    accuracies = dataclasses.replace(accuracies, unseen=(21,))
    assert accuracies.mean(unseen=True) == pytest.approx(0.1)


def texts(figure) -> str:
    """All that is written in a figure."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes._left_title]
        if axes.get_legend():
            found += axes.get_legend().get_texts()
    return "\n".join(text.get_text() for text in found)


def test_a_right_and_a_wrong_prediction_are_told_apart():
    image = np.zeros((32, 32, 3), np.uint8)
    figure = predictions_figure(
        [
            Prediction(image=image, truth="twenty", guesses=(("twenty", 0.9), ("thirty", 0.1))),
            Prediction(image=image, truth="thirty", guesses=(("twenty", 0.6), ("thirty", 0.4))),
        ],
        Accuracies(numbers=range(20, 40), unseen=(20, 30), accuracy=np.full(20, 0.25)),
    )
    shown = texts(figure)
    assert "None of the 2 numbers pictured here appeared in any training caption" in shown
    assert "twenty ✓" in shown
    assert "thirty ✗" in shown
    assert "60%" in shown
    assert "never in a caption: 25.0%" in shown


def test_loss_is_drawn_from_the_rows_that_have_one():
    top, bottom = loss_figure(METRICS).axes
    np.testing.assert_array_equal(top.lines[0].get_xydata(), [[1, 4], [2, 3]])
    np.testing.assert_array_equal(bottom.lines[0].get_xydata(), [[1, 1e-3], [2, 5e-4]])


def test_without_a_row_the_figure_of_the_loss_says_so():
    figure = loss_figure([{"step": 1}])
    figure.draw_without_rendering()
    assert "no step is recorded" in texts(figure)
