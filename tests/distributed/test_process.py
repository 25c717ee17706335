import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lit_jax.distributed import process
from lit_jax.errors import BAD_INPUT, UserError


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("2", "", r"JAX_NUM_PROCESSES .*JAX_PROCESS_ID"),
        ("two", "0", r"JAX_NUM_PROCESSES='two'"),
        ("0", "0", r"JAX_NUM_PROCESSES='0'"),
        ("9" * 20, "0", r"JAX_NUM_PROCESSES='99.*'"),
        ("2", "2", r"JAX_PROCESS_ID='2' .*0 .*1 .*JAX_NUM_PROCESSES=2"),
        ("2", "-1", r"JAX_PROCESS_ID='-1'"),
    ],
)
def test_mistakes_in_the_environment_are_named(monkeypatch, count, index, message):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with pytest.raises(UserError, match=message):
        process.initialize()


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_enable_x64", True), ("jax_random_seed_offset", 7), ("jax_default_prng_impl", "rbg")],
)
def test_a_setting_that_changes_what_a_run_computes_is_refused(name, value):
    right = jax.config.values[name]
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=f"{name.upper()}={value}.* {name.upper()}={right}"):
            process.initialize()
    finally:
        jax.config.update(name, right)


def test_a_platform_that_is_not_there_is_one_sentence():
    program = (
        "import sys; from lit_jax.cli import command; from lit_jax.distributed import process\n"
        "sys.exit(command(process.initialize)())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == BAD_INPUT
    assert "JAX_PLATFORMS='cuda'" in result.stderr
    assert result.stderr.count("\n") == 1


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


def test_at_the_end_of_a_command_output_is_written_and_exit_hooks_run():
    program = (
        "import atexit; from lit_jax.distributed import process;"
        "atexit.register(print, 'hook'); print('output', end=' '); process.end_command(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "output hook\n"), done.stderr
