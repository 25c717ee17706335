"""The cache of compiled programs on disk: a restart reads the programs instead of compiling them again."""

import contextlib
import logging
import os
import platform
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

# JAX has no public function that reads an entry.
from jax._src.compilation_cache import decompress_executable
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from lit_jax.buckets import AnyPath, BucketPath, check_access
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import output_path

log = logging.getLogger(__name__)

# The variable that names a folder for the programs of all runs and commands of a user.
VARIABLE = "LIT_JAX_CACHE"
# The programs of a large model take some hundred megabytes.
_FREE_BYTES = 1 << 28


@contextlib.contextmanager
def compilation_cache(folder: AnyPath) -> Iterator[None]:
    """Store the programs that JAX compiles, and read those that are stored, until the context ends.

    The folder in LIT_JAX_CACHE takes the place of `folder`. A cache that JAX has already, from
    JAX_COMPILATION_CACHE_DIR or an outer context, stays as it is. The first process writes, and all read. A
    folder that cannot be used gets one warning, and the programs are compiled as without a cache. The folder
    must be trusted: its entries are machine code.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    if given := os.environ.get(VARIABLE):
        folder = output_path(VARIABLE, given)
    folder /= _device_name()
    if problem := _problem(folder):
        log.warning(
            "Compiled programs cannot be stored in %s (%s), so each start compiles them again; set %s to a "
            "folder that can be written.",
            folder,
            problem,
            VARIABLE,
        )
        yield
        return
    # Another process may be writing an entry just now. JAX then compiles instead, and warns for nothing.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    new: dict[str, object] = {"jax_compilation_cache_dir": str(folder)}
    # A start compiles some fifty programs, most of them in less than the second that JAX asks for. A bucket
    # takes longer for one of these than the compiler.
    if isinstance(folder, Path):
        new["jax_persistent_cache_min_compile_time_secs"] = 0.0
    old = {name: jax.config.values[name] for name in new}
    _configure(new)
    try:
        yield
    finally:
        _configure(old)


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX opens the folder at the first compilation, and keeps it until it is told to forget it.
    jax_cache.reset_cache()


def _device_name() -> str:
    """Return a name for the devices whose programs can be exchanged.

    JAX distinguishes kinds of TPUs and GPUs by itself, but not CPUs. A program for a newer CPU ends an older
    one with an illegal instruction.
    """
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    features = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = (line for line in lines if line.startswith(("flags", "Features")))
        features = next(found, features)
    return f"cpu-{zlib.crc32(features.encode()):08x}"


def _problem(folder: AnyPath) -> str | None:
    """Make the folder, without damaged entries. Return the reason why it cannot be used, or None.

    All processes get a reason if one of them does. If some compiled what others read, collectives that belong
    to the compilation, as on GPUs, would wait for ever.
    """
    problem = _own_problem(folder)
    if jax.process_count() == 1:
        return problem
    # A folder that the first process makes must be there for all others, too.
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    token = folder / f"shared-{number:08x}"
    if is_primary() and not problem:
        problem = _failure(lambda: token.write_bytes(b""))
    multihost_utils.sync_global_devices("compilation cache")
    if not problem and _failure(token.read_bytes):
        problem = "it is not shared with the first process"
    found = multihost_utils.process_allgather(np.array(problem is not None))
    if is_primary():
        _failure(lambda: token.unlink(missing_ok=True))
    return problem or ("another process cannot use it" if found.any() else None)


def _failure(action: Callable[[], object]) -> str | None:
    """Return the reason why a function fails, None if it does not."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _own_problem(folder: AnyPath) -> str | None:
    # An object in a bucket is never cut off.
    if isinstance(folder, BucketPath):
        try:
            check_access(folder)
        except UserError as error:
            return str(error)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            return f"less than {_FREE_BYTES >> 20} MiB of the disk are free"
        if is_primary():
            if not os.access(folder, os.W_OK):
                return "no permission to write"
            for entry in folder.glob("*-cache"):
                # Another run may share the folder, and find the same entry.
                with contextlib.suppress(FileNotFoundError):
                    _remove_if_damaged(entry)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _remove_if_damaged(entry: Path) -> None:
    """Remove an entry that was cut off by the end of its process: JAX would neither use nor replace it."""
    content = entry.read_bytes()
    try:
        decompress_executable(content)
    # The type depends on the package that JAX has found for compression.
    except Exception:
        entry.unlink()
