import ast
import dataclasses
import inspect
import json
import math

import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax import config as config_module
from lit_jax import optimizer_config
from lit_jax.config import Config, EvalConfig, ModelConfig, TowerConfig, default, parse
from lit_jax.config_file import parse_arg
from lit_jax.config_schema import namesakes, steps
from lit_jax.configs.vit_bert import get_config
from lit_jax.errors import UserError
from lit_jax.optimizer_config import Adafactor, AdamW, Lamb, Lion


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
    size = TowerConfig(overrides={"image_size": (32, 48)})
    config = parse(dataclasses.asdict(dataclasses.replace(config, model=ModelConfig(image=size))))
    assert parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"batchsize": 4}, r"config.batchsize .*'batch_size'"),
        ({"batch_size": "4"}, r"config.batch_size .*'4'; .*int"),
        ({"batch_size": True}, r"config.batch_size .*True; .*int"),
        ({"seed": None}, r"config.seed .*None; .*int"),
        ({"loss": "hinge"}, r"config.loss .*'hinge'; .*'softmax', 'sigmoid'"),
        ({"schedule": 3}, "config.schedule .*3"),
        ({"policy": {"lock": "ll"}}, r"config.policy.lock .*'ll'"),
        ({"policy": {"trainable": ["x"]}}, r"config.policy.trainable\[0\] .*'x'"),
        ({"policy": {"trainable": [["x", 0]]}}, r"config.policy.trainable\[0\] .*0; .*bool"),
        ({"policy": {"learning_rate": [["x", "1"]]}}, r"learning_rate\[0\] .*'1'; .*float"),
        ({"policy": {"weight_decay": [["x", -1]]}}, r"weight_decay\[0\] .*-1.0; .*0"),
        ({"model": {"image": {"overrides": {1: 2}}}}, r"{1: 2}; .*dict\[str"),
        (
            {"policy": {"learning_rate": "x"}},
            r"tuple\[tuple\[str, float\], ...\]\.$",
        ),
        ({"evals": 3}, r"config.evals .*3; .*dict\[str, EvalConfig\]\.$"),
        ({"seed": -1}, r"config.seed .*-1; .*0 .*4294967295"),
        ({"optimizer": {"clip_norm": -1.0}}, r"clip_norm .*-1.0; .*1e-06"),
        ({"mesh": {"fsdp": 0}}, r"config.mesh.fsdp .*0; .*1"),
        (
            {"model": {"logit_scale_init": 100}},
            r"logit_scale_init .*100.0; .*-87",
        ),
        ({"label_smoothing": 2}, r"label_smoothing .*2.0; .*0 .*1"),
        ({"optimizer": {"b1": 1.0}}, r"b1 is 1.0; .*0 and .*0.999999"),
        ({"evals": {"a": {"batch_size": 0}}}, r"config.evals.a.batch_size .*0; .*1"),
        ({"evals": {"a": {"kinds": "x"}}}, r"config.evals.a.kinds .*'kind'"),
        ({"optimizer": {"warmup": 1}}, "config.optimizer.warmup .* 'config.schedule.warmup'"),
        ({"rand_augment": {}}, r"'config.data.rand_augment'"),
        ({"steps": 3}, r"config.steps .*duration,"),
        ({"learning_rat": 1}, r"'config.schedule.learning_rate'"),
        ({"batch_size": 2**31}, r"config.batch_size .*2147483648; .*2147483647"),
        ({"batch_size": 10**5000}, r"config.batch_size"),
        ({"schedule": {"learning_rate": math.inf}}, r"config.schedule.learning_rate .*inf"),
        ({"model": {"logit_scale_init": math.nan}}, r"config.model.logit_scale_init .*nan"),
        ({"data": {"crop_min_area": -math.inf}}, r"config.data.crop_min_area .*-inf"),
        ({"optimizer": {"eps": 1e39}}, r"config.optimizer.eps .*1e.39; .* float32"),
    ],
)
def test_mistakes_are_named(raw, message):
    with pytest.raises(UserError, match=message):
        parse(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, AdamW()),
        ({"b1": 0.5}, AdamW(b1=0.5)),
        ({"name": "lion", "weight_decay": 1}, Lion(weight_decay=1.0)),
        ({"name": "adafactor", "momentum_dtype": "float32"}, Adafactor(momentum_dtype="float32")),
        ({"name": "lamb", "clip_norm": None}, Lamb(clip_norm=None)),
    ],
)
def test_the_name_chooses_the_optimizer_and_its_defaults(raw, expected):
    assert parse({"optimizer": raw}).optimizer == expected
    assert parse(dataclasses.asdict(parse({"optimizer": raw}))).optimizer == expected


def test_a_field_of_another_optimizer_is_refused_with_those_that_there_are():
    for name, kind in {"lion": Lion, "adafactor": Adafactor}.items():
        with pytest.raises(UserError, match=r"config\.optimizer\.eps") as refused:
            parse({"optimizer": {"name": name, "eps": 1e-8}})
        own = {field.name for field in dataclasses.fields(kind)} - {"name"}
        listed = str(refused.value).partition("which has ")[2].partition(";")[0].split(", ")
        assert set(listed) == own
        assert repr(name) in str(refused.value)
    # The other groups' keys are still suggested, and a flag is read by the type of any optimizer's field.
    with pytest.raises(UserError, match=r"'config\.schedule\.learning_rate'"):
        parse({"optimizer": {"name": "lion", "learning_rate": 1e-3}})
    with pytest.raises(
        UserError, match=r"config\.optimizer\.name is 'sgd'.* 'adamw', 'adafactor', 'lion'"
    ):
        parse({"optimizer": {"name": "sgd", "b1": 0.9}})


def test_defaults_of_optimizers_are_those_of_their_sources():
    for kind, source in ((AdamW, optax.adamw), (Lion, optax.lion), (Lamb, optax.lamb)):
        usual = inspect.signature(source).parameters
        for name in {"b1", "b2", "eps"} & {field.name for field in dataclasses.fields(kind)}:
            assert getattr(kind(), name) == usual[name].default, (kind, name)
    # As in big_vision's scale_by_adafactor, which optax does not have.
    assert (Adafactor().b1, Adafactor().b2, Adafactor().momentum_dtype) == (0.9, 0.999, "bfloat16")


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
    [
        ("bas", r"demo, base, large, data="),
        ("base,batch=many", "batch .*'many'.*int"),
        ("batch", r"'batch' .*demo"),
        ("base,size=3", r"'size=3' .*demo"),
        ("base,large", r"'base' .*'large'"),
    ],
)
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
        ("1e99 steps", 2**31 - 1),
        ("9" * 400 + " epochs", 2**31 - 1),
    ],
)
def test_durations(duration, expected):
    assert steps(duration, batch_size=10, examples_per_epoch=100) == expected


@pytest.mark.parametrize("text", ["1.2.3 steps", ". steps", "1e400 steps", "5", "-1 steps"])
def test_a_number_that_is_none_is_no_duration(text):
    with pytest.raises(UserError, match=rf"^config\.schedule\.warmup='{text}'"):
        parse({"schedule": {"warmup": text}})


@given(st.text(max_size=12))
def test_any_other_text_is_no_duration(text):
    with pytest.raises(UserError, match=r"config\.checkpoint\.keep_every="):
        parse({"checkpoint": {"keep_every": f"x{text}"}})


def test_every_key_has_a_comment_above_it():
    """The documentation's list of keys is made of these comments."""
    found = 0
    for module in (config_module, optimizer_config):
        source = inspect.getsource(module)
        lines = source.splitlines()
        groups = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        keys = [line for group in groups for line in group.body if isinstance(line, ast.AnnAssign)]
        above = {ast.unparse(key): lines[key.lineno - 2].lstrip() for key in keys}
        assert [key for key, comment in above.items() if not comment.startswith("# ")] == []
        found += len(keys)
    assert found > 100


def test_the_key_nearest_to_the_root_is_suggested_first():
    assert namesakes(EvalConfig, "languages", "eval")[0] == "eval.languages"
    assert namesakes(Config, "batch_size") == ["config.batch_size", "config.evals.NAME.batch_size"]
    rates = ["config.schedule.learning_rate", "config.policy.learning_rate"]
    assert namesakes(Config, "learning_rate") == rates
