"""A locked tower in chunks of the batch."""

import re

import jax
import numpy as np
import pytest

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.models import chunks, ops
from lit_jax.models.chunks import chunk_count, in_chunks
from tests.models.test_towers import build, example

ROWS = 48


def pooled(tower, x):
    return tower(x, deterministic=True).pooled


@pytest.mark.parametrize(
    ("rows", "count"),
    # None of the divisors of 31 or 34 makes chunks of 8 to 16 rows.
    {1: 1, 16: 1, 31: 1, 34: 1, 17: 1, 24: 2, 48: 3, 100: 10, 1024: 64}.items(),
)
def test_chunks_are_equal_and_neither_large_nor_tiny(monkeypatch, rows, count):
    monkeypatch.setattr(chunks, "IMAGES", 16)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert chunk_count(8 * rows) == 1
        monkeypatch.setattr(ops, "device_kind", lambda: "TPU v4")
        assert chunk_count(8 * rows) == count
        # Initialisation, for one.
        assert chunk_count(8 * rows + 1) == 1
        monkeypatch.setenv("LIT_JAX_PLAIN_OPS", "1")
        assert chunk_count(8 * rows) == 1
    monkeypatch.delenv("LIT_JAX_PLAIN_OPS")
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2))):
        assert chunk_count(8 * rows) == 1


def test_chunks_on_v6e_are_half_as_large(monkeypatch):
    with jax.set_mesh(make_mesh(MeshConfig())):
        for kind, count in (("TPU v5 lite", 2), ("TPU v6 lite", 4)):
            monkeypatch.setattr(ops, "device_kind", lambda kind=kind: kind)
            monkeypatch.setattr(chunks, "device_kind", lambda kind=kind: kind)
            assert chunk_count(8 * 128) == count


@pytest.mark.parametrize("model_type", ["vit", "convnext"])
def test_a_tower_computes_the_same_in_chunks(monkeypatch, random_variables, model_type):
    tower = build(model_type)
    x = example(tower)
    variables = random_variables(tower, x)
    images = np.random.default_rng(0).normal(size=(ROWS, *x.shape[1:])).astype(np.float32)
    seen = []

    def compute(variables, images):
        def record(tower, part):
            seen.append(len(part))
            return pooled(tower, part)

        bound = tower.bind(variables)
        return in_chunks(record, bound, images)

    expected = jax.jit(compute)(variables, images)
    monkeypatch.setattr(chunks, "chunk_count", lambda batch: batch // 16)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(images, batch_sharding(mesh))
        compiled = jax.jit(compute).lower(variables, placed).compile()
        actual = compiled(variables, placed)
    # Two rows of each of the eight devices.
    assert seen[0] == ROWS
    assert set(seen[1:]) == {16}
    assert actual.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    # No rows move between devices.
    assert not re.search("all-to-all|collective-permute", str(compiled.as_text()))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
