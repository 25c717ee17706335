"""Writes arguments, values and gradients into argv[1]: test_blockwise_losses.py runs two processes of it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lit_jax.config import MeshConfig
from lit_jax.distributed import process
from lit_jax.distributed.mesh import global_batch, make_mesh
from lit_jax.training.losses import make_loss

process.initialize()
assert [device.process_index for device in jax.devices()] == [0] * 4 + [1] * 4
mesh = make_mesh(MeshConfig(data=4, fsdp=2))
pairs = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
pairs /= np.linalg.norm(pairs, axis=-1, keepdims=True)
scalars = np.float32(np.log(50)), np.float32(-4)
own = slice(12 * jax.process_index(), 12 * jax.process_index() + 12)
arrays = {f"arg{i}": x for i, x in enumerate((*pairs, *scalars))}
with jax.set_mesh(mesh):
    batch = global_batch({"image": pairs[0, own], "text": pairs[1, own]}, mesh)
    args = batch["image"], batch["text"], *map(jnp.asarray, scalars)
    for name, smoothing in (("softmax", 0.1), ("sigmoid", 0.0)):
        loss = make_loss(name, implementation="blockwise", label_smoothing=smoothing)
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*args)
        arrays[name] = value
        for i, gradient in enumerate(gradients):
            arrays[f"{name}_gradient{i}"] = multihost_utils.process_allgather(gradient, tiled=True)
np.savez(sys.argv[1], **arrays)
