"""Tiny Hugging Face folders: those of tests/goldens/files, and copies that tests change."""

import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lit_jax.models.families import build_tower
from lit_jax.weights import files, hub

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "files"


def in_one_stack(params: dict) -> dict:
    """A tower with its last block in the stack, as a pooling by all tokens has it."""
    layers = [
        tree if name == "layer" else jax.tree.map(lambda x: x[None], tree)
        for name, tree in params["encoder"].items()
    ]
    stack = jax.tree.map(lambda *parts: np.concatenate(parts), *layers)
    return {**params, "encoder": {"layer": stack}}


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    return GOLDEN


@pytest.fixture(scope="session")
def outputs() -> dict[str, jax.Array]:
    """Inputs, and what PyTorch computes from them with the golden weights."""
    with np.load(GOLDEN / "outputs.npz") as content:
        return {name: jnp.asarray(array) for name, array in content.items()}


@pytest.fixture(scope="session")
def tower() -> Callable:
    """The module of a folder's config.json."""

    def build(folder: pathlib.Path, pooling="pooler"):
        return build_tower(hub.read_config(folder), pooling=pooling, dtype="float32")

    return build


@pytest.fixture
def changed(tmp_path) -> Callable:
    """A copy of a golden folder with torch names, after a change of its tensors and of its config."""

    def change(
        name: str, change_tensors: Callable[[dict], dict] = lambda tensors: tensors, **config
    ) -> pathlib.Path:
        folder = tmp_path / name
        folder.mkdir()
        content = json.loads((GOLDEN / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        tensors = change_tensors(dict(files.read_tensors(GOLDEN / name).values))
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder

    return change


@pytest.fixture
def copied(tmp_path) -> Callable:
    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy
