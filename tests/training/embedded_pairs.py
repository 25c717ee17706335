"""Pairs to embed, and what an embedding of them leaves on disk."""

import functools
from pathlib import Path

import jax

from lit_jax import embed as command
from lit_jax.distributed.mesh import make_mesh
from lit_jax.training import trainer

ROOT = Path(__file__).parents[2]
EXAMPLES = 40
BAD = 7  # its image is no image
WITHOUT_CAPTION = 11
SHARD = "shard-00001-of-00006.array_record"


def on_devices(monkeypatch, count):
    monkeypatch.setattr(
        command, "make_mesh", lambda config, devices: make_mesh(config, devices[:count])
    )
    some = functools.partial(make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(trainer, "make_mesh", some)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
