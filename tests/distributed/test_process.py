import ctypes
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lit_jax.distributed import process
from lit_jax.errors import UserError


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("2", "", "JAX_NUM_PROCESSES set without JAX_PROCESS_ID; set all three or none"),
        ("two", "0", "JAX_PROCESS_ID=0 is no number .* JAX_NUM_PROCESSES=two; correct it"),
        ("2", "2", "JAX_PROCESS_ID=2 is no number from 0 to below JAX_NUM_PROCESSES=2"),
    ],
)
def test_mistakes_in_the_environment_are_named(monkeypatch, count, index, message):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with pytest.raises(UserError, match=message):
        process.initialize()


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_after_compiling_free_memory_goes_back_to_the_system(monkeypatch):
    monkeypatch.setattr(process, "COMPILE_SECONDS", 0.0)
    process._give_memory_back_after_compiling()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [libc.malloc(64 * 1024) for _ in range(4000)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    # The last lies behind all that is free, which the C library then keeps.
    for block in blocks[:-1]:
        libc.free(ctypes.c_void_p(block))
    kept = resident()
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert kept - resident() > 100 * 2**20
    libc.free(ctypes.c_void_p(blocks[-1]))
