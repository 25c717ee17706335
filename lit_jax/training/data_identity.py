"""Which data a run trains on: what a resumed run compares, so that it goes on with the same ones."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lit_jax.config import Config
from lit_jax.config_values import steps
from lit_jax.data.example import Source
from lit_jax.data.fingerprint import data_fingerprint, sampled_examples
from lit_jax.data.mixture import open_training_data
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import parse_json, write_json

log = logging.getLogger(__name__)

DATA_FILE = "data.json"
# The value of --allow_changes that lets a run go on with other data under the same config.
ALLOWED = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of a run.

    Attributes:
        source: None if they cannot be read and the run, which is finished, does not need them.
        examples: how many there are, or were when the run was started.
    """

    source: Source | None
    examples: int


def open_data(config: Config, workdir: Path, trained: int | None) -> TrainingData:
    """Open the data that `config` names; a finished run goes without those that are gone.

    Args:
        trained: the step of the latest checkpoint in `workdir`.
    """
    try:
        source = open_training_data(config.data, text_only=bool(config.model.teacher))
    except UserError as error:
        known = _read(workdir) if trained is not None else None
        if known is None or trained != _total(config, known["examples"]):
            raise
        log.warning("This run is finished and goes without its data: %s", error)
        return TrainingData(source=None, examples=known["examples"])
    return TrainingData(source=source, examples=len(source))


def _total(config: Config, examples: int) -> int:
    return steps(config.duration, batch_size=config.batch_size, examples_per_epoch=examples)


def identify(source: Source) -> dict[str, Any] | None:
    """Return length and fingerprint of the data in the first process, None in the others."""
    if not is_primary():
        return None
    sample = sampled_examples(source)
    fingerprint = data_fingerprint(source, sample, "image", "text")
    return {"examples": len(source), "fingerprint": fingerprint}


def check_same_data(workdir: Path, found: dict[str, Any] | None) -> None:
    """Raise UserError if `found` is not what the run in `workdir` was trained on."""
    if found is None:
        return
    known = _read(workdir)
    if known is None:
        log.warning("%s does not say which data it was trained on: they are not compared.", workdir)
    elif known != found:
        counts = f"{known['examples']} examples then and {found['examples']} now"
        if known["examples"] == found["examples"]:
            counts += ", in another order or with another content"
        raise UserError(
            f"{workdir} was trained on other data than config.data names now ({counts}); give it the former "
            f"data, choose another --workdir, or go on with these by --allow_changes={ALLOWED}."
        )


def save_identity(workdir: Path, identity: dict[str, Any] | None) -> None:
    """Write what `identify` gave, in the process that has it."""
    if identity is not None:
        write_json(workdir / DATA_FILE, identity)


def _read(workdir: Path) -> dict[str, Any] | None:
    path = workdir / DATA_FILE
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
        return {"examples": int(content["examples"]), "fingerprint": content["fingerprint"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); put it back, or remove it if the data are the same as before."
        ) from error
