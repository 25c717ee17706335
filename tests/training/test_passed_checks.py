"""What a user passes to fit by mistake, and what passed functions return by mistake."""

import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lit_jax
from lit_jax.configs import vit_bert
from lit_jax.errors import UserError
from lit_jax.training.passed_checks import (
    callback_result,
    check_arguments,
    check_objects,
    checked_loss,
    checked_optimizer,
)


def loss(output, batch):
    return jnp.float32(1), {}


def of_one(output):
    return jnp.float32(1), {}


ROOT = Path(__file__).parents[2]
# All that fit takes, in order.
ARGUMENTS = {
    "config": vit_bert.get_config(),
    "workdir": "run",
    "loss": loss,
    "optimizer": optax.adam(0.1),
    "towers": {},
    "callbacks": [("1 step", print)],
    "allowed_changes": ["data"],
}


class Loss:
    def __call__(self, output, batch):
        return loss(output, batch)


def check(*, config, workdir, allowed_changes, **objects):
    check_arguments(config, workdir, allowed_changes)
    check_objects(**objects)


@pytest.mark.parametrize(
    ("passed", "named"),
    [
        ({"config": "configs/vit_bert.py"}, "config .*'configs/vit_bert.py'"),
        ({"config": None}, "config .*None"),
        ({"config": vit_bert.get_config}, "config .*get_config"),
        ({"workdir": None}, "workdir .*NoneType"),
        ({"workdir": 3}, "workdir .*int"),
        ({"allowed_changes": "data.train.path"}, r"\['data.train.path'\]"),
        ({"loss": "sigmoid"}, "loss .*str"),
        # An empty dict is false, and must not count as no loss.
        ({"loss": {}}, "loss .*dict"),
        ({"loss": Loss}, "loss .*class Loss"),
        ({"loss": of_one}, "loss .*functools.partial"),
        ({"optimizer": optax.adam}, "optimizer .*function adam"),
        ({"optimizer": 0.1}, "optimizer .*float"),
        ({"optimizer": (optax.adam(0.1), optax.sgd(0.1))}, "optimizer .*tuple"),
        ({"towers": {"vision": None}}, "'vision'.*image"),
        ({"towers": [None]}, "list"),
        ({"towers": {"image": Loss}}, "image tower .*class Loss"),
        ({"towers": {"text": None}}, "text tower .*NoneType"),
        ({"callbacks": loss}, "callbacks .*function loss"),
        ({"callbacks": ("1 step", of_one)}, r"callbacks\[0\] .*str"),
        ({"callbacks": [(of_one, "1 step")]}, r"callbacks\[0\] .*tuple"),
        ({"callbacks": [("1 step", of_one), ("1 step", loss)]}, r"callbacks\[1\] .*trained"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_an_object_of_another_kind_is_refused(passed, named):
    with pytest.raises(UserError, match=named):
        check(**ARGUMENTS | passed)


def test_fit_checks_its_arguments_before_it_writes(tmp_path):
    check(**ARGUMENTS)
    with pytest.raises(UserError, match=r"functools.partial"):
        lit_jax.fit(vit_bert.get_config(), tmp_path / "run", loss=of_one)
    assert not (tmp_path / "run").exists()


OUTPUT = types.SimpleNamespace(metrics={"logit_scale": jnp.float32(1)})
ONE = jnp.float32(1)


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (None, "None"),
        (ONE, "float32"),
        ((ONE, [ONE]), "list"),
        ((ONE, {}, {}), "tuple"),
        ((jnp.ones(3), {}), r"\(3,\)"),
        ((jnp.int32(3), {}), "int32"),
        ((ONE, {"own": jnp.ones(3)}), r"'own' .*\(3,\)"),
        ((ONE, {"own": {"part": ONE}}), "'own' .*dict"),
        ((ONE, {"own": "text"}), "'own' .*str"),
        ((ONE, {3: ONE}), "3"),
        ((ONE, {"loss": ONE}), "'loss'"),
        ((ONE, {"grad_norm": ONE}), "'grad_norm'"),
        ((ONE, {"logit_scale": ONE}), "'logit_scale'"),
        ((ONE, {"mfu": ONE}), "'mfu'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_loss_that_returns_what_no_step_can_use_is_refused(returned, named):
    with pytest.raises(UserError, match=f"loss .*{named}"):
        checked_loss(lambda output, batch: returned)(OUTPUT, {})


def test_a_loss_is_called_with_output_and_batch():
    own = functools.partial(lambda output, batch, *, own: (own, {"half": own / 2, "n": 3}), own=ONE)
    value, metrics = jax.jit(lambda: checked_loss(own)(OUTPUT, {}))()
    assert (value, metrics["half"], metrics["n"]) == (1, 0.5, 3)


def test_an_optimizer_gets_the_value_and_one_that_needs_more_is_refused():
    params = {"kernel": jnp.ones(2)}
    for own in (optax.sgd(1.0), optax.polyak_sgd(), optax.contrib.reduce_on_plateau()):
        optimizer = checked_optimizer(own)
        state, extra = optimizer.init(params), {"value": ONE}
        updates, _ = jax.eval_shape(optimizer.update, params, state, params, **extra)
        assert updates["kernel"].shape == (2,)
    optimizer = checked_optimizer(optax.lbfgs())
    with pytest.raises(UserError, match="value_fn"):
        optimizer.update(params, optimizer.init(params), params, value=ONE)


def test_a_callback_returns_numbers_or_none(caplog):
    assert callback_result(None, 0) == {}
    numbers = {"a": 1, "b": np.float32(2), "c": jnp.float32(3), "d": True, "e": np.ones(())}
    assert callback_result(numbers, 0) == {"a": 1, "b": 2, "c": 3, "d": 1, "e": 1}
    for returned, named in (
        (1.0, "float"),
        ([1.0], "list"),
        ({1: 1.0}, "named 1"),
        ({"a": "text"}, "'a' .*str"),
        ({"a": None}, "'a' .*NoneType"),
        ({"a": np.ones(3)}, r"'a' .*\(3,\)"),
    ):
        with pytest.raises(UserError, match=rf"callbacks\[2\] .*{named}"):
            callback_result(returned, 2)
    assert callback_result({"a": float("nan"), "b": jnp.float32(jnp.inf), "c": 1}, 2) == {"c": 1}
    assert "nan for 'a'" in caplog.text
    assert "inf for 'b'" in caplog.text


# As a script without the guard calls it when a data worker imports the script.
UNGUARDED = """
import multiprocessing
import sys

import lit_jax

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=print)
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)
lit_jax.fit({}, "run")
"""


@pytest.mark.long
def test_a_worker_that_imports_the_script_does_not_train(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, tmp_path / "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.search(r"UserError: .*__main__.*config.data.workers=0", result.stderr)
    assert not (tmp_path / "run").exists()
