"""Strict JAX for every test: eight CPU devices, no silent promotion of dtype or rank."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["NPROC"] = "64"  # see lit_jax/distributed/process.py
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once

# Within a session, and in the processes it starts, the same program is compiled once.
_CACHE = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# The first example of a property compiles or imports something: its time says nothing.
hypothesis.settings.register_profile("lit_jax", deadline=None)
hypothesis.settings.load_profile("lit_jax")
