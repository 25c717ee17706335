"""Random parameters, and the comparison of a tower with what make_towers.py wrote."""

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.weights.hub import read_config
from tests.harness import largest, run_tower

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def random_variables() -> Callable[..., dict[str, Any]]:
    """Draws variables for a module and an example of its inputs: module.init compiles for seconds."""

    def draw(module: nn.Module, *example: Any) -> dict[str, Any]:
        random = np.random.default_rng(0)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *example)

        def value(path, leaf):
            values = random.normal(0, 0.3, leaf.shape)
            is_variance = getattr(path[-1], "key", "") == "var"
            return jnp.asarray(1 + np.abs(values) if is_variance else values, leaf.dtype)

        return jax.tree_util.tree_map_with_path(value, shapes)

    return draw


@pytest.fixture(scope="module")
def plain_ops():
    """Convolutional towers compile three times as fast with plain operations, which test_ops.py compares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_JAX_PLAIN_OPS", "1")
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    return HERE.parent / "goldens" / "towers"


@pytest.fixture(scope="session")
def reference() -> types.ModuleType:
    """make_towers.py, which needs PyTorch."""
    return importlib.import_module("tests.goldens.make_towers")


@pytest.fixture(scope="session")
def check_tower() -> Callable[[Path], None]:
    """Compares with what make_towers.write_tower has put into a folder."""
    return _check_tower


def _check_tower(folder: Path) -> None:
    with np.load(folder / "arrays.npz") as arrays:
        computed = run_tower(folder, dict(arrays))
    hf = read_config(folder)
    depth = hf.get("num_hidden_layers", hf.get("n_layers")) or sum(hf["depths"])
    atol = 1e-5 if depth == 1 else 1e-4  # of a layer, of a tower
    assert_close(computed.outputs, computed.expected_outputs, atol)
    # Judged by the largest of all: some, such as that of a key bias, are 0 but for rounding.
    scale = largest(computed.expected_gradients)
    assert_close(computed.gradients, computed.expected_gradients, atol * scale)
    assert_close(computed.statistics, computed.expected_statistics, 1e-4)


def assert_close(ours: Any, theirs: Any, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)
