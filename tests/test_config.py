import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.vit_bert import get_config
from lit_jax.config import Config, EvalConfig, default, parse, parse_arg, steps
from lit_jax.errors import UserError


def test_default_is_the_default_config_and_every_key_can_be_overridden():
    assert parse(default()) == Config()
    config = default()
    config.model.text.overrides = {"hidden_size": 4}
    config.data.crop_min_area = 0.5
    config.schedule.warmup = "1 epoch"
    parsed = parse(config)
    assert parsed.data.crop_min_area == 0.5
    assert parsed.model.text.overrides == {"hidden_size": 4}


def test_config_survives_json():
    config = parse(get_config("demo"))
    assert isinstance(config.evals["unseen16"], EvalConfig)
    assert parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"batchsize": 4}, "config.batchsize is not a config key; did you mean 'batch_size'"),
        ({"batch_size": "4"}, "config.batch_size is '4'; it must be of type int"),
        ({"batch_size": True}, "must be of type int"),
        ({"seed": None}, "must be of type int"),
        ({"loss": "hinge"}, "must be one of 'softmax', 'sigmoid'"),
        ({"schedule": 3}, "must be a group of keys"),
        ({"policy": {"lock": "ll"}}, "config.policy.lock is 'll'"),
        ({"policy": {"trainable": ["x"]}}, r"config.policy.trainable\[0\] is 'x'"),
        ({"evals": {"a": {"kinds": "x"}}}, "config.evals.a.kinds .* did you mean 'kind'"),
    ],
)
def test_mistakes_are_named(raw, message):
    with pytest.raises(UserError, match=message):
        parse(raw)


@pytest.mark.parametrize("arg", ["", "demo", "base", "large"])
def test_every_variant_parses(arg):
    assert parse(get_config(arg)).model.image.model


def test_arguments_of_the_recipe():
    config = parse(get_config("base,data=/some/where,batch=1024"))
    assert config.data.train.path == "/some/where"
    assert config.batch_size == 1024
    assert config.policy.lock == "LU"
    assert config.optimizer.name == "adafactor"


@pytest.mark.parametrize(
    ("arg", "message"),
    [("bas", "known are demo, base, large, data="), ("base,batch=many", "batch must be of type int"),
     ("batch", "no variant"), ("base,size=3", "no variant")],
)  # fmt: skip
def test_arguments_are_parsed_strictly(arg, message):
    with pytest.raises(UserError, match=message):
        get_config(arg)


def test_parse_arg_takes_the_first_variant_by_default():
    assert parse_arg("x=1", variants=("a", "b"), options={"x": int}) == ("a", {"x": 1})


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("300 steps", 300),
        ("1 step", 1),
        ("2.5 epochs", 25),
        ("1e3 examples", 100),
        ("99 examples", 9),
    ],
)
def test_durations(duration, expected):
    assert steps(duration, batch_size=10, examples_per_epoch=100) == expected


@given(st.text(max_size=12))
def test_any_other_text_is_no_duration(text):
    with pytest.raises(UserError, match="is no duration"):
        steps(f"x{text}", batch_size=10, examples_per_epoch=100)
