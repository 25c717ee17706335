import pytest

from lit_jax.config import PolicyConfig
from lit_jax.errors import UserError
from lit_jax.training.policy import (
    LOCK_RULES,
    is_pretrained,
    merge,
    resolve_policy,
    warn_of_full_rate,
)

PARAMS = {
    "vision_model": {"layernorm": {"scale": 0, "bias": 1}, "dense": {"kernel": 2}},
    "text_model": {"embeddings": {"embedding": 3}, "dense": {"kernel": 4, "bias": 5}},
    "visual_projection": {"kernel": 6},
    "text_projection": {"kernel": 7},
    "logit_scale": 8,
}


def trains(lock, **rules):
    policy = resolve_policy(PolicyConfig(lock=lock, **rules), PARAMS)
    return {path for path, wanted in policy.trainable.items() if wanted}


HEADS = {"visual_projection/kernel", "text_projection/kernel", "logit_scale"}
IMAGE = {"vision_model/layernorm/scale", "vision_model/layernorm/bias", "vision_model/dense/kernel"}
TEXT = {"text_model/embeddings/embedding", "text_model/dense/kernel", "text_model/dense/bias"}


@pytest.mark.parametrize(
    ("lock", "trained", "pretrained"),
    [
        ("Lu", TEXT | HEADS, (True, False)),
        ("LU", TEXT | HEADS, (True, True)),
        ("uu", IMAGE | TEXT | HEADS, (False, False)),
        ("Uu", IMAGE | TEXT | HEADS, (True, False)),
        ("UU", IMAGE | TEXT | HEADS, (True, True)),
        ("uL", IMAGE | HEADS, (False, True)),
        ("UL", IMAGE | HEADS, (True, True)),
    ],
)
def test_the_seven_presets(lock, trained, pretrained):
    assert trains(lock) == trained
    assert is_pretrained(lock) == pretrained


def test_there_are_no_other_presets():
    assert set(LOCK_RULES) == {"Lu", "LU", "uu", "Uu", "UU", "uL", "UL"}


def test_the_first_rule_wins_and_comes_before_the_preset():
    rules = (("vision_model/layernorm/bias", False), ("vision_model/layernorm/.*", True))
    assert trains("LU", trainable=rules) & IMAGE == {"vision_model/layernorm/scale"}


def test_split_and_merge_are_inverse():
    policy = resolve_policy(PolicyConfig(lock="LU"), PARAMS)
    trainable, frozen = policy.split(PARAMS)
    assert set(frozen) == {"vision_model"}
    assert merge(trainable, frozen) == PARAMS


def test_multipliers_cover_the_trainable_parameters_alone():
    config = PolicyConfig(lock="LU", learning_rate=(("text_model/embeddings/.*", 0.1),))
    policy = resolve_policy(config, PARAMS)
    assert set(policy.learning_rate) == set(policy.weight_decay) == TEXT | HEADS
    assert policy.learning_rate["text_model/embeddings/embedding"] == 0.1
    assert policy.learning_rate["text_model/dense/kernel"] == 1.0
    assert policy.weight_decay["text_model/dense/kernel"] == 1.0
    for path in ("text_model/dense/bias", "logit_scale"):
        assert policy.weight_decay[path] == 0.0


@pytest.mark.parametrize(
    ("lock", "rules", "is_told"),
    [
        ("UU", {}, True),
        ("UL", {}, True),
        ("Uu", {"learning_rate": (("text_model/.*", 0.1),)}, True),
        ("UU", {"learning_rate": (("vision_model/.*", 0.1),)}, False),
        ("UU", {"learning_rate": ((".*kernel", 1.0),)}, False),
        ("UU", {"trainable": (("vision_model/.*", False),)}, False),
        ("LU", {"trainable": (("vision_model/dense/.*", True),)}, True),
        ("LU", {}, False),
        ("uu", {}, False),
        ("uL", {}, False),
    ],
)
def test_a_pretrained_image_tower_at_the_full_rate_is_told(caplog, lock, rules, is_told):
    config = PolicyConfig(lock=lock, **rules)
    warn_of_full_rate(config, resolve_policy(config, PARAMS), PARAMS)
    assert len(caplog.records) == is_told
    for rule in (
        "learning_rate=(('vision_model/.*', 0.1),)",
        "weight_decay=(('vision_model/.*', 0.0),)",
    ):
        assert (f"config.policy.{rule}" in caplog.text) == is_told


def test_what_shifts_and_scales_does_not_decay():
    block = {"mlp": {"kernel": 0, "grn": {"weight": 0, "bias": 0}}, "norm": {"scale": 0}}
    policy = resolve_policy(PolicyConfig(lock="UU"), {"vision_model": block, "logit_bias": 0})
    decayed = {path for path, rate in policy.weight_decay.items() if rate}
    assert decayed == {"vision_model/mlp/kernel"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"trainable": (("vision_modle/.*", True),)}, "config.policy.trainable: 'vision_modle/.*'"),
        ({"trainable": (("(", True),)}, r"config.policy.trainable: '\(' "),
        (
            {"learning_rate": (("vision_model/.*", 0.1),)},
            r"config.policy.learning_rate: 'vision_model/.*'",
        ),
        ({"trainable": ((".*", False),)}, "config.policy.trainable locks"),
        ({"trainable": (("v.*", False),)}, r"visual_projection/kernel"),
    ],
)
def test_mistaken_rules_are_refused(rules, message):
    with pytest.raises(UserError, match=message.replace(".*'", r"\.\*'")):
        resolve_policy(PolicyConfig(lock="LU", **rules), PARAMS)


def test_a_projection_is_locked_by_a_rule_that_names_it():
    assert "visual_projection/kernel" not in trains(
        "LU", trainable=(("visual_projection/.*", False),)
    )
