"""Strict JAX for every test: eight CPU devices, no silent promotion of dtype or rank."""

import collections
import gc
import importlib
import itertools
import os
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

_COMPILATION_CACHE = tempfile.TemporaryDirectory()

# For this process, whose plugins have imported JAX already, and for those that tests start.
_SETTINGS = {
    "jax_platforms": "cpu",
    # Within a session the same program is compiled once; most of the time of most tests is compilation.
    "jax_compilation_cache_dir": _COMPILATION_CACHE.name,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_disable_most_optimizations": True,
}
for _name, _value in _SETTINGS.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
# gcsfs reads this when it is imported; see tests/object_store/served.py.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# See lit_jax/distributed/process.py, which does the same in the commands.
os.environ["NPROC"] = "256"
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# The first example of a property compiles or imports something: its time says nothing.
hypothesis.settings.register_profile("lit_jax", deadline=None)
hypothesis.settings.load_profile("lit_jax")


# Under the hook of jaxtyping, all that a module of lit_jax imports is compiled from source. Imported before
# that, these packages come from their bytecode: three seconds less a process.
_IMPORTED_BEFORE = (
    "beartype.door",
    "flax.linen",
    "grain",
    "optax",
    "orbax.checkpoint",
    "transformers.models.auto.tokenization_auto",
)


def pytest_sessionstart(session):
    """Import large packages, but not in the process that only distributes tests: all others wait for it."""
    if session.config.getoption("dist") == "no":
        for name in _IMPORTED_BEFORE:
            importlib.import_module(name)


@pytest.hookimpl(trylast=True)  # after the selection by marks
def pytest_collection_modifyitems(items):
    """Order the files by the time that they take, the longest first, so that all workers end together."""
    seconds = collections.Counter()
    for item in items:
        seconds[item.path] += _typical_seconds(item)
    items.sort(key=lambda item: -seconds[item.path])


def _typical_seconds(item):
    if "command" in item.fixturenames:
        return 40
    if item.get_closest_marker("long"):
        return 10
    return 2 if "train" in item.fixturenames else 0.2


def pytest_collection_finish():
    """Spare the collector what has been imported: tracing makes and drops so many small objects that
    looking through all others each time was a sixth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_configure(config):
    """Compile the default run with XLA's older emitters, in half the time.

    The long tests and those with PyTorch use the emitters that users get, so that CI runs both.
    """
    if "not long" in config.getoption("markexpr"):
        # Programs as small as these are not worth several modules of code, which also take more memory maps.
        new = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {new}"


@pytest.fixture(scope="session")
def usual_emitters():
    """For `jax.jit(compiler_options=)`, where a test compares the last bits of two programs."""
    return {"xla_cpu_use_fusion_emitters": True}


@pytest.fixture
def no_cache_of_the_suite():
    """JAX without the compilation cache that all tests share, as users have it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def small_heap():
    """For files that call many commands: each command ends with a full collection, which takes a second late
    in a session. From here on the collector leaves alone what the files before have piled up.
    """
    gc.collect()
    gc.freeze()


_MEMORY_MAPS = Path("/proc/self/maps")  # of Linux
_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Each compiled program takes some of the 65,530 memory maps that Linux gives a process, and XLA crashes
    when there are none left. The compilation cache on disk has what is dropped here.
    """
    yield
    # To count them takes some milliseconds.
    if next(_TESTS) % 8 or not _MEMORY_MAPS.exists():
        return
    if _MEMORY_MAPS.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
        gc.collect()
