"""Random parameters, and the comparison of a tower with what make_goldens.py wrote."""

import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.models.families import build_tower
from lit_jax.trees import flatten
from lit_jax.weights.hub import read_config
from lit_jax.weights.load import load_tower

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def random_variables() -> Callable[..., dict[str, Any]]:
    """Draws variables for a module and an example of its input: module.init compiles for seconds."""

    def draw(module: nn.Module, example: Any) -> dict[str, Any]:
        random = np.random.default_rng(0)
        shapes = jax.eval_shape(module.init, jax.random.key(0), example)

        def value(path, leaf):
            values = random.normal(0, 0.3, leaf.shape)
            is_variance = getattr(path[-1], "key", "") == "var"
            return jnp.asarray(1 + np.abs(values) if is_variance else values, leaf.dtype)

        return jax.tree_util.tree_map_with_path(value, shapes)

    return draw


@pytest.fixture(scope="session")
def goldens() -> Path:
    return HERE / "goldens"


@pytest.fixture(scope="session")
def reference() -> types.ModuleType:
    """make_goldens.py, which needs PyTorch."""
    spec = importlib.util.spec_from_file_location("make_goldens", HERE / "make_goldens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def check_tower() -> Callable[[Path], None]:
    """Compares with what make_goldens.write_tower has put into a folder."""
    return _check_tower


def _check_tower(folder: Path) -> None:
    hf = read_config(folder)
    with np.load(folder / "arrays.npz") as file:
        arrays = {name: jnp.asarray(file[name]) for name in file.files if name != "pooling"}
        module = build_tower(hf, pooling=str(file["pooling"]), dtype="float32")
    params, _ = load_tower(folder, module)
    pixels = [arrays[name] for name in ("input.pixel_values",) if name in arrays]
    text = [f"input.{name}" for name in ("input_ids", "attention_mask")]
    text += [f"input.{name}" for name in ("token_type_ids", "position_ids")]
    ids = [] if pixels else [arrays.get(name) for name in text]
    outputs = ("last_hidden_state", "pooled")
    cotangents = tuple(arrays[f"cotangent.{name}"] for name in outputs)
    train = (folder / "after").exists()

    @jax.jit
    def run(params, pixels):
        def forward(params, pixels):
            output, state = module.apply(
                {"params": params}, *pixels, *ids, deterministic=not train, mutable=["batch_stats"]
            )
            return tuple(output), state

        values, vjp, state = jax.vjp(forward, params, pixels, has_aux=True)
        return values, vjp(cotangents), state

    values, gradients, state = run(params, pixels)
    depth = hf.get("num_hidden_layers", hf.get("n_layers")) or sum(hf["depths"])
    atol = 1e-5 if depth == 1 else 1e-4  # of a layer, of a tower
    for name, value in zip(outputs, values, strict=True):
        np.testing.assert_allclose(value, arrays[f"output.{name}"], rtol=0, atol=atol)

    expected_params, _ = load_tower(folder / "gradients", module)
    expected = (expected_params, [arrays["gradient.pixel_values"] for _ in pixels])
    # Judged by the largest of all: some, such as that of a key bias, are 0 but for rounding.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * largest),
        gradients,
        expected,
    )
    statistics = flatten(state.get("batch_stats", {}))
    assert bool(statistics) == train
    after = flatten(load_tower(folder / "after", module)[0]) if train else {}
    for name, value in statistics.items():
        np.testing.assert_allclose(value, after[name], rtol=1e-4, atol=1e-4, err_msg=name)
