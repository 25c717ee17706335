"""Computes with a folder of weights what make_towers.py has computed with the same weights."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models.families import build_tower
from lit_jax.training.losses import similarity_logits
from lit_jax.trees import flatten
from lit_jax.weights.hub import read_config
from lit_jax.weights.load import load_dual_encoder, load_tower

Arrays = Mapping[str, np.ndarray]
TEXTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Computed(NamedTuple):
    """Ours, and theirs of the same shape."""

    outputs: dict[str, Any]
    gradients: Any  # of the parameters, and of the pixels of a tower
    expected_outputs: dict[str, Any]
    expected_gradients: Any
    statistics: Mapping[str, Any] = MappingProxyType({})  # that train mode leaves behind, by path
    expected_statistics: Mapping[str, Any] = MappingProxyType({})


def run_tower(folder: Path, arrays: Arrays) -> Computed:
    """`folder` is that of a tower, with gradients/ in it and, if it is to be in train mode, after/; see
    `make_towers.Reference`.
    """
    train = (folder / "after").exists()
    module = build_tower(read_config(folder), pooling=str(arrays["pooling"]), dtype="float32")
    params, expected = (load_tower(path, module)[0] for path in (folder, folder / "gradients"))
    pixels = [arrays[name] for name in ("input.pixel_values",) if name in arrays]
    ids = [] if pixels else [arrays.get(f"input.{name}") for name in TEXTS]
    theirs, cotangents = _outputs(arrays), _outputs(arrays, "cotangent")
    ours, gradients, state = _run_tower(module, train, (params, pixels), ids, cotangents)
    expected = (expected, [arrays["gradient.pixel_values"] for _ in pixels])
    after = flatten(load_tower(folder / "after", module)[0]) if train else {}
    statistics = flatten(state.get("batch_stats", {}))
    return Computed(
        *(ours, gradients, theirs, expected, statistics),
        {path: value for path, value in after.items() if path.endswith(("/mean", "/var"))},
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_tower(module, train, params_and_pixels, ids, cotangents):
    def forward(params_and_pixels):
        params, pixels = params_and_pixels
        output, state = module.apply(
            {"params": params}, *pixels, *ids, deterministic=not train, mutable=["batch_stats"]
        )
        return output._asdict(), state

    values, vjp, state = jax.vjp(forward, params_and_pixels, has_aux=True)
    return values, *vjp(cotangents), state


def run_dual_encoder(folder: Path, arrays: Arrays) -> Computed:
    """`folder` is that of a dual encoder, with gradients/ in it."""
    module, params, _, _ = load_dual_encoder(folder, dtype="float32")
    _, expected, _, _ = load_dual_encoder(folder / "gradients", dtype="float32")
    batch = _outputs(arrays, "input")
    theirs, cotangents = _outputs(arrays), _outputs(arrays, "cotangent")
    ours, gradients = _run_dual_encoder(module, params, batch, cotangents)
    return Computed(ours, gradients, theirs, expected)


@functools.partial(jax.jit, static_argnums=0)
def _run_dual_encoder(module, params, batch, cotangents):
    def forward(params):
        output = module.apply({"params": params}, batch)
        return {
            "image_embeds": output.image_embeds,
            "text_embeds": output.text_embeds,
            "logits_per_image": similarity_logits(*output),
        }

    values, vjp = jax.vjp(forward, params)
    return values, *vjp(cotangents)


def _outputs(arrays: Arrays, kind: str = "output") -> dict[str, jax.Array]:
    start = f"{kind}."
    return {
        name.removeprefix(start): jnp.asarray(array)
        for name, array in arrays.items()
        if name.startswith(start)
    }


def largest(tree: Any) -> float:
    """The largest absolute value."""
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
