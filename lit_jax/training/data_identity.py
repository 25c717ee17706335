"""The identity of a run's data, which a resumed run compares with the data that it finds."""

import dataclasses
import logging
import re
from collections.abc import Collection
from typing import Any

from lit_jax.buckets import AnyPath
from lit_jax.config import Config
from lit_jax.data.example import Source
from lit_jax.data.mixture import open_training_data
from lit_jax.data.own_source import open_passed
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import parse_json, write_json
from lit_jax.precomputed.fingerprint import data_fingerprint, sampled_at_start
from lit_jax.training.durations import steps_of

log = logging.getLogger(__name__)

DATA_FILE = "data.json"
# The value of --allow_changes that lets a run go on with other data under the same config.
ALLOWED = "data"
# A permitted change of one of these keys permits other data, too.
_NAMES_DATA = re.compile(r"data\.(train|mixture)\b|model\.teacher$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of a run.

    Attributes:
        source: the examples; empty if a finished run goes without data that cannot be read.
        examples: the number of examples, now or at the start of the run.
        identity: length and fingerprint of the data; None in all processes but the first, and for an empty
            source.
    """

    source: Source
    examples: int
    identity: dict[str, Any] | None


def may_differ(changes: Collection[str], allowed_changes: Collection[str]) -> bool:
    """Return whether a run may continue with other data, given the keys of the config that have changed."""
    return ALLOWED in allowed_changes or any(map(_NAMES_DATA.match, changes))


def open_data(
    config: Config,
    workdir: AnyPath,
    trained: int | None,
    *,
    may_differ: bool,
    passed: Source | None = None,
) -> TrainingData:
    """Open the data that `config` names. A finished run may go without data that cannot be opened.

    Args:
        trained: the step of the latest checkpoint in `workdir`, None without one.
        may_differ: whether a run with a checkpoint may continue with other data.
        passed: a source that replaces the data of the config.

    Raises UserError if the data cannot be opened, or differ from those of the run so far.
    """
    try:
        source = _open(config, passed)
    except UserError as error:
        # A finished run may still have evaluations to repeat, which need the model but not the data.
        known = _read(workdir) if trained is not None else None
        # The run is finished if its latest checkpoint is at the last step of the duration.
        if known is None or trained != steps_of(config, known["examples"], config.duration):
            raise
        log.warning("This run is finished, so its data are not needed: %s", error)
        return TrainingData(source=(), examples=known["examples"], identity=None)
    identity = _identify(source)
    if identity is not None and trained is not None and not may_differ:
        _check_same_data(workdir, identity)
    return TrainingData(source=source, examples=len(source), identity=identity)


def _open(config: Config, passed: Source | None) -> Source:
    if passed is None:
        return open_training_data(config.data, text_only=bool(config.model.teacher))
    return open_passed(passed)


def _identify(source: Source) -> dict[str, Any] | None:
    # Hundreds of examples are read for this, and one process is enough.
    if not is_primary():
        return None
    sample = sampled_at_start(source)
    fingerprint = data_fingerprint(source, sample, "image", "text")
    return {"examples": len(source), "fingerprint": fingerprint}


def _check_same_data(workdir: AnyPath, found: dict[str, Any]) -> None:
    known = _read(workdir)
    if known is None:
        # The folder is of an earlier version, or a user has removed data.json.
        log.warning("%s does not record its training data, so the data are not compared.", workdir)
    elif known != found:
        counts = f"{known['examples']} examples then and {found['examples']} now"
        if known["examples"] == found["examples"]:
            counts += ", in another order or with another content"
        raise UserError(
            f"{workdir} was trained on other data than config.data names now ({counts}); give the original "
            f"data, choose another --workdir, or continue with the new data by --allow_changes={ALLOWED}."
        )


def save_identity(workdir: AnyPath, identity: dict[str, Any] | None) -> None:
    """Write the identity of a run's data, in the process that has it; do nothing for None."""
    if identity is not None:
        write_json(workdir / DATA_FILE, identity)


def _read(workdir: AnyPath) -> dict[str, Any] | None:
    path = workdir / DATA_FILE
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
        return {"examples": int(content["examples"]), "fingerprint": content["fingerprint"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or remove it if the data have not changed."
        ) from error
