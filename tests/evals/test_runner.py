"""Evaluations of a config: names of the metrics, batch sizes, and errors before any model exists."""

import json

import pytest

from lit_jax.config import EvalConfig, SourceConfig
from lit_jax.errors import UserError
from lit_jax.evals.encode import Encoder
from lit_jax.evals.runner import PreparedEval, open_evals, run, table


@pytest.fixture
def folder(tmp_path, pictures):
    """The first four pictures as a captions.jsonl folder, with a class file."""
    from PIL import Image

    with (tmp_path / "captions.jsonl").open("w") as file:
        for example in pictures[:4]:
            name = f"{example['key']}.png"
            Image.fromarray(example["image"]).save(tmp_path / name)
            row = {"image": name, "captions": example["captions"], "label": example["label"]}
            file.write(json.dumps(row) + "\n")
    classes = {"classnames": ["a", "b", "c"], "templates": ["a photo of the number {}"]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    return tmp_path


def test_metrics_have_flat_names(encoder, params, folder):
    data = SourceConfig(path=str(folder))
    evals = {
        "few": EvalConfig(data=data, classes=str(folder / "classes.json")),
        "pairs": EvalConfig(kind="retrieval", data=data),
    }
    metrics = run(open_evals(evals), encoder, params)
    assert metrics["zero_shot/few/n"] == metrics["retrieval/pairs/images"] == 4
    assert metrics["retrieval/pairs/texts"] == 8
    assert 0 <= metrics["zero_shot/few/top1"] <= 1
    assert metrics["retrieval/pairs/image_to_text_recall_at_10"] == 1
    assert table(metrics).splitlines()[0].startswith("zero_shot/few/top1 ")


def test_each_evaluation_has_its_own_batch_size(encoder, params):
    batch_sizes = []

    def measure(encoder: Encoder, params) -> dict[str, float]:
        batch_sizes.append(encoder.batch_size)
        return {}

    prepared = [PreparedEval(name=str(n), batch_size=n, run=measure) for n in (24, 8)]
    assert run(prepared, encoder, params) == {}
    assert batch_sizes == [24, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, r"config\.evals\.few\.classes is missing"),
        ({"classes": "nowhere.json"}, r"nowhere\.json cannot be read"),
        ({"data": SourceConfig(path="nowhere")}, "nowhere"),
        ({"data": SourceConfig(path="demo", split="unseen")}, "the label 'twenty two'"),
    ],
)
def test_errors_come_before_any_model(folder, changes, message):
    fields = {"data": SourceConfig(path=str(folder)), "classes": str(folder / "classes.json")}
    with pytest.raises(UserError, match=message):
        open_evals({"few": EvalConfig(**(fields | changes))})
