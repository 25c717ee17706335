"""Data sets that a Python script makes: the path of the source is the script, the data the folder it writes.

The script gets the folder to write as its only argument. The folder lies in the user's cache under a name
that depends on the content of the script, so that a changed script makes a new folder.

Only a command that names the script, by a flag or in its config file, runs the script. A command that reads
the config.json of a run runs nothing, since that file may come from anyone: `made_by` then raises an error
that shows the command to run.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_jax.config import Config, SourceConfig
from lit_jax.errors import UserError
from lit_jax.files import cache_folder, expand_home

log = logging.getLogger(__name__)


def is_maker(path: str) -> bool:
    """Return whether the path of a source names a script that makes the data."""
    return path.endswith(".py")


def made_by(script: str) -> Path:
    """Return the folder that a script has made. Raise UserError if the script or its folder is missing."""
    folder = _folder(script)
    if not folder.is_dir():
        raise UserError(
            f"The data of {script} have not been made yet; run: {sys.executable} {script} {folder}"
        )
    return folder


def sources_of(config: Config) -> Iterator[SourceConfig]:
    """Yield all sources of a config, including those of its evaluations."""
    yield from (config.data.train, *config.data.mixture.values())
    for task in config.evals.values():
        yield from (task.data, task.train)


def make_missing(sources: Iterable[SourceConfig]) -> None:
    """Run each script among the paths of the sources whose folder is missing.

    Several processes may do so at once: each makes a folder of its own, and the first process to finish gives
    its folder the name. A folder appears complete or not at all.

    Raises UserError if a script is missing or fails.
    """
    for script in dict.fromkeys(source.path for source in sources if is_maker(source.path)):
        folder = _folder(script)
        if not folder.is_dir():
            log.info("Running %s, which makes the data in %s.", script, folder)
            _make(script, folder)


def _folder(script: str) -> Path:
    path = expand_home(script, script)
    try:
        # A script that has changed may make other data, so its content is a part of the name.
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"The script {script} cannot be read ({error.strerror}); correct its path or its permissions."
        ) from error
    return cache_folder() / f"{path.stem}-{digest[:16]}"


def _make(script: str, folder: Path) -> None:
    # Beside the final folder, so that the rename stays within one file system.
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The same interpreter, so that the script finds the packages of this environment.
        command = [sys.executable, expand_home(script, script), new]
        code = subprocess.run(command, check=False).returncode
        if code or not new.is_dir():
            problem = f"ended with exit code {code}" if code else "made no folder"
            raise UserError(f"The data script {script} {problem}; see its output above.")
        _move(new, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can "
            "be written."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        # `rename` does not replace a folder that is not empty: another process has finished first.
        if not folder.is_dir():
            raise
