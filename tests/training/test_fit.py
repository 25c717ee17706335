"""What a user passes into training: a source, a loss, an optimizer, callbacks; and losses by name."""

import collections
import dataclasses
import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lit_jax
from lit_jax.config import Config, parse
from lit_jax.errors import Preempted, UserError
from lit_jax.models.tower import ImageTower, TowerOutput
from lit_jax.optimizer_config import Lion
from lit_jax.training.losses import make_objective, sigmoid_loss, softmax_loss
from lit_jax.training.metrics import read_metrics
from lit_jax.training.passed import describe
from lit_jax.training.workdir import load_run, read_config
from lit_jax.trees import flatten
from tests.training.conftest import stop_after

WORDS = ("two", "three", "forty")


class Noise:
    """A source of a user's own: pictures that are computed."""

    def __init__(self, seed=0, count=40):
        self._seed, self._count = seed, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        rng = np.random.default_rng((self._seed, index))
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        captions = (f"the number {WORDS[index % 3]}",)
        return {"key": f"{index}", "image": image, "captions": captions, "label": None}


class MoreNoise(Noise):
    """Another class with the same examples."""


def weighted(output, batch, *, temperature):
    """A loss of a user's own, which also reads the batch."""
    value = softmax_loss(output.image_embeds, output.text_embeds, jnp.log(temperature))
    return value, {"words": batch["attention_mask"].sum().astype(jnp.float32)}


def steep(output, batch):
    return softmax_loss(output.image_embeds, output.text_embeds, output.logit_scale), {}


@pytest.fixture
def own(tiny):
    """A config without data of its own, and the objects that are passed."""
    passed = {
        "source": Noise(),
        "loss": functools.partial(weighted, temperature=14.0),
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    }
    return tiny(**{"data.train.path": "", "data.train.split": None}), passed


def test_a_run_of_own_objects_resumes_exactly_and_refuses_others(
    own, tmp_path, one_device, monkeypatch
):
    config, passed = own
    whole = lit_jax.fit(config, tmp_path / "whole", **passed)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted):
            lit_jax.fit(config, tmp_path / "parts", **passed)
    others = {
        "source": (MoreNoise(), "MoreNoise"),
        "loss": (functools.partial(weighted, temperature=15.0), "weighted"),
        "optimizer": (optax.sgd(0.1), "sgd|chain|trace"),
    }
    for name, (other, named) in others.items():
        with pytest.raises(UserError, match=rf"{name} .*{named}.*--allow_changes={name}"):
            lit_jax.fit(config, tmp_path / "parts", **passed | {name: other})
        without = {key: value for key, value in passed.items() if key != name}
        with pytest.raises(UserError, match=rf"{name} .*--allow_changes={name}"):
            lit_jax.fit(config, tmp_path / "parts", **without)
    with pytest.raises(UserError, match="--allow_changes=data"):
        lit_jax.fit(config, tmp_path / "parts", **passed | {"source": Noise(seed=1)})
    parts = lit_jax.fit(config, tmp_path / "parts", **passed)
    expected = flatten(whole.params)
    for found in (parts.params, load_run(tmp_path / "parts").params):
        assert flatten(found).keys() == expected.keys()
        for path, value in flatten(found).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)
    rows = read_metrics(tmp_path / "parts")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["words"] > 0 and "learning_rate" not in row for row in rows)
    recorded = json.loads((tmp_path / "parts" / "config.json").read_text())["passed"]
    assert recorded["source"] == {"module": __name__, "name": "Noise"}
    assert recorded["loss"]["keywords"] == {"temperature": 14.0}
    fingerprint = json.loads((tmp_path / "parts" / "data.json").read_text())
    assert fingerprint["examples"] == 40
    assert fingerprint["fingerprint"]


def test_callbacks_are_called_each_so_many_steps_and_report(tiny, tmp_path, one_device):
    seen = []

    def measure(trained):
        seen.append(trained.step)
        return {"norm": float(jnp.linalg.norm(trained.params["logit_scale"]))}

    def silent(trained):
        seen.append(-trained.step)

    calls = [("2 steps", measure), ("48 examples", silent)]
    lit_jax.fit(tiny(duration="4 steps"), tmp_path, callbacks=calls)
    assert seen == [2, -3, 4]
    assert [row["step"] for row in read_metrics(tmp_path) if "norm" in row] == [2, 4]
    with pytest.raises(UserError, match=r"config.callbacks\[0\]='8 examples'"):
        lit_jax.fit(tiny(), tmp_path / "other", callbacks=[("8 examples", silent)])


def test_a_metric_with_the_name_of_a_column_is_refused_or_renamed(
    tiny, tmp_path, one_device, caplog
):
    def loss(output, batch):
        return jnp.float32(0) * output.image_embeds.mean(), {"seconds/step": jnp.float32(1)}

    with pytest.raises(UserError, match="'seconds/step'"):
        lit_jax.fit(tiny(), tmp_path / "loss", loss=loss)
    assert not (tmp_path / "loss" / "config.json").exists()

    def measure(trained):
        return {"goodput": 7.0, "own": 8.0}

    lit_jax.fit(tiny(duration="2 steps"), tmp_path / "run", callbacks=[("1 step", measure)])
    rows = [row for row in read_metrics(tmp_path / "run") if "own" in row]
    assert [row["callback/goodput"] for row in rows] == [7, 7]
    assert all(row["goodput"] < 1 for row in rows)
    assert caplog.text.count("'callback/goodput'") == 1


def test_a_source_takes_the_place_of_the_data_of_the_config(tiny, tmp_path, one_device, caplog):
    for data in (
        {"data.train.path": "/no/such"},
        {"data.mixture": {"a": {"path": "/no/such"}}, "data.train.path": ""},
    ):
        caplog.clear()
        caplog.set_level("INFO", "lit_jax")
        with pytest.raises(UserError, match=r"\bNoise\b"):
            lit_jax.fit(tiny(**data), tmp_path / "run", source=Noise(count=0))
        assert ": /no/such." in caplog.text
    assert not (tmp_path / "run").exists()


def test_warnings_about_negatives_and_the_scale_are_not_for_a_passed_loss(
    tiny, tmp_path, one_device, caplog
):
    # Every image of the source is in a batch more than once, and the scale is far above the usual one.
    config = tiny(**{"duration": "2 steps", "model.logit_scale_init": 6.0})
    lit_jax.fit(config, tmp_path / "own", source=Noise(count=12), loss=steep)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    lit_jax.fit(config, tmp_path / "configured", source=Noise(count=12))
    assert "config.data.train has 12 images" in caplog.text
    assert "scale" in caplog.text


@dataclasses.dataclass(frozen=True)
class MeanConfig:
    model_type: str = "mean_of_pixels"
    image_size: int = 32
    num_channels: int = 3
    width: int = 16


class MeanTower(ImageTower):
    """A tower of a user's own: a dense layer of the mean colour."""

    @nn.compact
    def __call__(self, pixel_values, *, deterministic=True):
        means = pixel_values.mean((1, 2)).astype(self.dtype)
        pooled = nn.Dense(self.config.width, dtype=self.dtype, name="colour")(means)
        return TowerOutput(pooled[:, None], pooled)


@pytest.mark.long
def test_an_own_tower_trains_locked_or_not_and_is_read_back_with_itself_alone(
    tiny, tmp_path, one_device
):
    tower = MeanTower(MeanConfig())
    kernel = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    params = {"colour": {"kernel": kernel, "bias": np.ones(16, np.float32)}}
    short = {"duration": "2 steps"}
    locked = lit_jax.fit(tiny(**short), tmp_path / "LU", towers={"image": (tower, params)})
    np.testing.assert_array_equal(locked.params["vision_model"]["colour"]["kernel"], kernel)
    trained = lit_jax.fit(
        tiny(**short, **{"policy.lock": "uu"}), tmp_path / "uu", towers={"image": tower}
    )
    assert trained.params["vision_model"]["colour"]["kernel"].shape == (3, 16)
    again = lit_jax.load_run(tmp_path / "LU", towers={"image": tower})
    np.testing.assert_array_equal(again.params["vision_model"]["colour"]["kernel"], kernel)
    with pytest.raises(UserError, match=r"load_run"):
        lit_jax.load_run(tmp_path / "LU")
    wider = MeanTower(MeanConfig(width=8))
    with pytest.raises(UserError, match=r"towers .*MeanTower.*--allow_changes=towers"):
        lit_jax.fit(tiny(**short), tmp_path / "LU", towers={"image": (wider, params)})
    with pytest.raises(UserError, match=r"config.policy.lock='LU'"):
        lit_jax.fit(tiny(), tmp_path / "none", towers={"image": tower})


def outputs(batch=6):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, batch, 4)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.asarray(z[0]), jnp.asarray(z[1]), jnp.float32(2.0), jnp.float32(-1.0)


def test_losses_by_name_are_summed_by_their_weights():
    losses = {
        "contrast": {"weight": 0.5, "label_smoothing": 0.1},
        "pairs": {"kind": "sigmoid", "weight": 2.0},
    }
    value, metrics = make_objective(parse({"losses": losses}))(outputs(), {})
    contrast = softmax_loss(*outputs(), label_smoothing=0.1)
    pairs = sigmoid_loss(*outputs())
    np.testing.assert_allclose(value, 0.5 * contrast + 2.0 * pairs, rtol=1e-6)
    assert metrics.keys() == {"loss/contrast", "loss/pairs"}
    np.testing.assert_allclose(metrics["loss/pairs"], pairs, rtol=1e-6)
    value, metrics = make_objective(parse({"loss": "sigmoid"}))(outputs(), {})
    np.testing.assert_array_equal(value, pairs)
    assert metrics == {}
    for beside in ({"loss": "sigmoid"}, {"label_smoothing": 0.1}):
        with pytest.raises(
            UserError, match=r"config.losses .*config.loss .*config.label_smoothing"
        ):
            make_objective(parse({"losses": losses, **beside}))


def test_several_losses_train_and_report_each(tiny, tmp_path, one_device):
    losses = {"softmax": {"weight": 0.5}, "sigmoid": {"kind": "sigmoid"}}
    lit_jax.fit(tiny(losses=losses, duration="2 steps"), tmp_path)
    for row in read_metrics(tmp_path):
        total = 0.5 * row["loss/softmax"] + row["loss/sigmoid"]
        assert row["loss"] == pytest.approx(total, rel=1e-6)


def test_a_description_tells_objects_apart_and_is_the_same_in_another_process():
    one, other = optax.adam(0.1), optax.adam(0.2)
    assert describe(one) == describe(optax.adam(0.1))
    assert describe(one) != describe(other)
    assert describe(Noise(1)) != describe(Noise(2))
    assert describe(np.arange(3)) != describe(np.arange(4))
    assert describe(jax.jit(outputs)) == describe(outputs)
    for first, second in (
        (Noise(1).__getitem__, Noise(2).__getitem__),
        (Noise(1).__getitem__, Noise(1).__len__),
        (functools.partial(Noise(1).__getitem__, 1), functools.partial(Noise(2).__getitem__, 1)),
        (len, max),
        ({"a"}, {"b"}),
        (b"a", b"b"),
        (Path("a"), Path("b")),
        (range(2), range(3)),
        (re.compile("a"), re.compile("b")),
        (collections.deque([1]), collections.deque([2])),
        (jax.random.key(0), jax.random.key(1)),
        (np.array([1, "a"], object), np.array([1, "b"], object)),
    ):
        assert describe(first) != describe(second)
        assert " at 0x" not in json.dumps(describe(first))
    assert describe({"a", "b"}) == describe({"b", "a"})
    assert describe(np.array(["ab"], object)) == describe(np.array(["".join(["a", "b"])], object))
    for value in (one, Noise(1), functools.partial(weighted, temperature=1.0), np.arange(3)):
        text = json.dumps(describe(value))
        assert " at 0x" not in text


def test_a_run_folder_of_before_optimizers_had_fields_of_their_own_is_read(tmp_path):
    common = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "momentum_dtype": "float32", "clip_norm": 1.0}
    for name in ("adamw", "lion"):
        raw = {"optimizer": {"name": name, "weight_decay": 0.1, **common}}
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config()) | raw))
        optimizer = read_config(tmp_path).optimizer
        assert dataclasses.asdict(optimizer).items() <= raw["optimizer"].items()
    # Lion never used the eps, and everything else is the default of today.
    assert optimizer == Lion(weight_decay=0.1)


def test_a_run_folder_of_before_the_renaming_is_read(tmp_path):
    raw = dataclasses.asdict(Config(batch_size=4))
    del raw["loss_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"loss_form": "lean"}))
    config = read_config(tmp_path)
    assert (config.loss_implementation, config.batch_size) == ("blockwise", 4)
    with pytest.raises(UserError, match=r"loss_form.*'loss_implementation'"):
        parse({"loss_form": "lean"})
