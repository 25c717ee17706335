"""The cache of compiled programs on disk: a restart reads the programs instead of compiling them again."""

import contextlib
import logging
import os
import platform
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from lit_jax.distributed.process import is_primary

log = logging.getLogger(__name__)

# The variable that names a folder for the programs of all runs and commands of a user.
VARIABLE = "LIT_JAX_CACHE"
# The programs of a large model take some hundred megabytes.
_FREE_BYTES = 1 << 28
_CHUNK = 1 << 20
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Store the programs that JAX compiles, and read those that are stored, until the context ends.

    The folder in LIT_JAX_CACHE takes the place of `folder`. A cache that JAX has already, from
    JAX_COMPILATION_CACHE_DIR or an outer context, stays as it is. The first process writes, and all read. A
    folder that cannot be used gets one warning, and the programs are compiled as without a cache. The folder
    must be trusted: its entries are machine code.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    folder = Path(os.environ.get(VARIABLE) or folder).expanduser() / _device_name()
    if problem := _prepare(folder):
        log.warning(
            "Compiled programs cannot be stored in %s (%s), so each start compiles them again; set %s to a "
            "folder that can be written.",
            folder,
            problem,
            VARIABLE,
        )
        yield
        return
    # An entry that another process is just writing is no reason to alarm anybody: JAX compiles instead.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    # A start compiles some fifty programs, most of them in less than the second that JAX asks for.
    new = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
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


def _prepare(folder: Path) -> str | None:
    """Make the folder, without damaged entries. Return the reason why it cannot be used, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            return f"less than {_FREE_BYTES >> 20} MiB of the disk are free"
        if is_primary():
            if not os.access(folder, os.W_OK):
                return "no permission to write"
            for entry in folder.glob("*-cache"):
                # JAX neither uses nor replaces an entry that was cut off by the end of its process.
                if _is_damaged(entry):
                    entry.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_damaged(entry: Path) -> bool:
    """Return whether a file is a zlib stream, as JAX writes it, that has lost its end or its checksum."""
    stream = zlib.decompressobj()
    with entry.open("rb") as file:
        chunk = file.read(_CHUNK)
        # With the package zstandard installed, JAX writes such files, which its own checks must do for.
        if chunk.startswith(_ZSTANDARD):
            return False
        try:
            while chunk:
                stream.decompress(chunk)
                chunk = file.read(_CHUNK)
        except zlib.error:
            return True
    return not stream.eof
