"""A step is the same however many parts its matrices are cut into, whether they divide or not."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.training.model_factory import build_model, first_parameters
from lit_jax.training.train_step import TrainStep
from lit_jax.trees import flatten

# Of the matrices (36, 72) and (72, 36) one axis divides by 8, of (36, 36) none; of the table (142, 36) the
# words divide by 2, the features by 4. All are wide enough for Adafactor to factor their moments.
ODD = {"hidden_size": 36, "num_attention_heads": 2, "intermediate_size": 72}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FC1 = "text_model/encoder/layer/mlp/fc1/kernel"
QUERY = "text_model/encoder/layer/attention/query/kernel"
WORDS = "text_model/embeddings/word_embeddings/embedding"
LIES = {
    1: {FC1: P(), QUERY: P(), WORDS: P()},
    2: {FC1: P(None, None, "fsdp"), QUERY: P(None, "fsdp", None), WORDS: P("fsdp", None)},
    4: {FC1: P(None, None, "fsdp"), QUERY: P(None, "fsdp", None), WORDS: P(None, "fsdp")},
    8: {FC1: P(None, None, "fsdp"), QUERY: P(), WORDS: P()},
}
ADAFACTOR = {"optimizer.name": "adafactor", "optimizer.momentum_dtype": "float32"}


@pytest.fixture(scope="module")
def two_steps(tiny):
    """What two steps of a text tower from scratch report, and leave of the parameters, by path."""
    done = {}

    def run(fsdp, **changes):
        key = (fsdp, *changes.items())
        if key not in done:
            done[key] = _two_steps(tiny, fsdp, changes)
        return done[key]

    return run


def _two_steps(tiny, fsdp, changes):
    config = tiny(
        **{
            "policy.lock": "Lu",
            "mesh.fsdp": fsdp,
            "model.text.overrides": ODD | WITHOUT_DROPOUT,
            # Else a gradient of next to nothing moves as far as any other.
            **({} if "optimizer.name" in changes else {"optimizer.eps": 1e-3}),
            **changes,
        }
    )
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    with jax.set_mesh(mesh):
        step = TrainStep.build(build_model(config, mesh), optax.constant_schedule(1e-2))
        params, frozen = first_parameters(step.model)
        rng = np.random.default_rng(0)
        rows = {
            name: rng.integers(1, 100, like.shape).astype(like.dtype)
            if name == "input_ids"
            else np.ones(like.shape, like.dtype)
            for name, like in step.abstract_batch(config.batch_size).items()
        }
        rows["pixel_values"] = rng.integers(0, 256, rows["pixel_values"].shape, np.uint8)
        batch = global_batch(rows, mesh)
        state, train_step, reports = step.first_state(params), step.jitted(), []
        for _ in range(2):
            state, metrics = train_step(state, frozen, batch)
            reports.append(jax.device_get(metrics))
    lies = {path: leaf.sharding.spec for path, leaf in flatten(state.params).items()}
    return reports, lies, flatten(jax.device_get(state.params))


@pytest.mark.parametrize(
    ("fsdp", "changes"),
    [
        pytest.param(
            4,
            {"remat": "matmuls", "loss_implementation": "blockwise"},
            marks=pytest.mark.long,
        ),
        (8, {}),
        pytest.param(2, {}, marks=pytest.mark.long),
        pytest.param(4, ADAFACTOR, marks=pytest.mark.long),
    ],
)
def test_two_steps_are_those_of_whole_matrices(two_steps, fsdp, changes):
    of_optimizer = {k: v for k, v in changes.items() if k.startswith("optimizer.")}
    expected_reports, lies, expected = two_steps(1, **of_optimizer)
    assert {path: lies[path] for path in LIES[1]} == LIES[1]
    reports, lies, params = two_steps(fsdp, **changes)
    assert {path: lies[path] for path in LIES[fsdp]} == LIES[fsdp]
    for ours, theirs in zip(reports, expected_reports, strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    assert reports[1]["loss"] != reports[0]["loss"]
    for path, value in params.items():
        if not path.endswith("key/bias"):  # its gradient is 0 but for rounding
            np.testing.assert_allclose(value, expected[path], atol=1e-5, err_msg=path)
