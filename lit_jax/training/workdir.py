"""The run folder: everything that a command needs to continue the same run.

data.json              length and fingerprint of the training data
config.json            the resolved config, with the format of the folder and the version that wrote it
model/                 config, tokenizer and image processor of the model
parameters.txt         which parameters train, how fast, and how they are split over the mesh
frozen/, checkpoints/  see checkpoints.py
metrics.jsonl, tensorboard/  the metrics of steps and evaluations
begun.json             the time at which the first start began
profile/               see profiler.py
results.json, evals/, report/  the final evaluations and their figures
compilation_cache/     see distributed/compilation_cache.py
"""

import dataclasses
import logging
import math
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lit_jax import __version__
from lit_jax.bucket_copies import temporary_copy, written_locally
from lit_jax.buckets import AnyPath, remove_folder
from lit_jax.config import TEACHER, Config, MeshConfig, Side, parse
from lit_jax.config_schema import RENAMED, changed_keys
from lit_jax.data.image_processor import load_processor
from lit_jax.data.text import check_saved, save_tokenizer
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.process import is_primary
from lit_jax.errors import UserError
from lit_jax.files import any_path, atomic_write, parse_json, write_json
from lit_jax.models.tower import Tower
from lit_jax.training.checkpoints import frozen_folder, restore_frozen, restore_params
from lit_jax.training.model_factory import Model, OwnTowers, TrainedModel, build_model
from lit_jax.training.restore import with_saved_policy
from lit_jax.training.teacher import TeacherFolder
from lit_jax.training.tower_paths import TowerPaths
from lit_jax.training.workdir_errors import complete_steps
from lit_jax.trees import flatten
from lit_jax.weights.hub import read_config as read_hf_config

log = logging.getLogger(__name__)

# The format of a run folder. It rises when a default changes, so that no run changes halfway.
FORMAT = 2
# The last version that wrote config.json without a format. Only this version can continue such a run.
_WITHOUT_FORMAT = "0.1.0"

# The checksums of the other files in the model's folder.
MODEL_SUMS = "sums.json"

# The keys of config.json that do not belong to the config. "passed" describes objects passed to `fit`.
_NOT_CONFIG = ("format", "version", "passed")

# Keys that every version has written. Without them today's defaults would stand for another model.
_ALWAYS = ("batch_size", "data", "duration", "model", "policy")

# The fields of optimizers that config.json had once, though these optimizers did not use them.
_UNUSED_FIELDS = {"lion": ("eps",), "adafactor": ("eps",)}

# Values of renamed keys, by their former name.
_RENAMED_VALUES = {"global": "dense", "lean": "blockwise"}

# The keys that name the towers that a run starts from. After the first checkpoint the run has its own copy.
TOWER_KEYS = {"model.dual_encoder", "model.teacher"} | {
    f"model.{side}.{key}" for side in ("image", "text") for key in ("model", "overrides")
}


def load_run(
    workdir: str | AnyPath,
    *,
    step: int | None = None,
    dtype: str | None = None,
    towers: Mapping[Side, Tower] = MappingProxyType({}),
) -> TrainedModel:
    """Read a checkpoint of a run onto all devices of this machine; nothing is written.

    Args:
        step: the step of the checkpoint; None is the latest.
        dtype: the dtype of the computation and of the locked parameters; None is the run's own.
        towers: the towers that were passed to the training.

    Raises UserError if `workdir` is not a run, has no complete checkpoint, or needs towers to be passed.
    """
    workdir = any_path("workdir", str(workdir))
    config = read_config(workdir)
    if config is None:
        raise UserError(
            f"{workdir} is not a run folder, because it has no config.json; give the --workdir of a training."
        )
    _check_towers_passed(workdir, towers)
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    own_towers: OwnTowers = {side: (tower, None) for side, tower in towers.items()}
    while True:
        steps = complete_steps(workdir)
        chosen = steps[-1] if steps and step is None else step
        try:
            # An earlier step may have been saved with another policy than that of config.json.
            saved = with_saved_policy(config, workdir, chosen) if chosen in steps else config
            return _load_step(workdir, saved, chosen, own_towers)
        except UserError as error:
            left = complete_steps(workdir)
            # A running training saves newer checkpoints meanwhile, and removes older ones file by file.
            if step is None and left[-1:] > steps[-1:]:
                continue
            if chosen in steps and chosen not in left:
                raise UserError(
                    f"The checkpoint of step {chosen} of {workdir} was removed while it was read, as a "
                    f"running training removes old ones; choose one of {left}."
                ) from error
            raise


def _check_towers_passed(workdir: AnyPath, towers: Collection[Side]) -> None:
    """Raise UserError if the run was trained with a passed tower that is missing now."""
    passed = (_read_config_file(workdir) or {}).get("passed", {})
    missing = {*passed.get("towers", ())} - {*towers}
    # config.json has only the description of a passed tower, from which no module can be built.
    for side in sorted(missing):
        raise UserError(
            f"The {side} tower of {workdir} was passed to lit_jax.fit; load the run in Python, with "
            "lit_jax.load_run(workdir, towers=...)."
        )


def _load_step(
    workdir: AnyPath, config: Config, step: int | None, own_towers: OwnTowers
) -> TrainedModel:
    # The mesh of the training may not fit this machine, so its devices form a mesh of the default shape.
    model = build_model(config, make_mesh(MeshConfig()), saved_towers(workdir), own_towers)
    step, trainable = restore_params(workdir, model.abstract_trainable, step, model.uncut)
    frozen = restore_frozen(frozen_folder(workdir, step), model.abstract_frozen, model.uncut)
    return TrainedModel.merged(model, trainable, frozen, step)


def model_folder(workdir: AnyPath) -> AnyPath:
    """Return the folder with config, tokenizer and image processor of a run's model."""
    return workdir / "model"


def saved_towers(workdir: AnyPath) -> TowerPaths:
    """Return the towers of a run from its own folder, without the Hub.

    Raises UserError if a file of the model's folder is not as the run has written it.
    """
    origin = model_folder(workdir)
    # transformers reads its files only from a local folder.
    folder = temporary_copy(origin)
    if not (folder / "config.json").is_file():
        raise UserError(f"{origin} has no config.json; restore it, or choose another --workdir.")
    _check_model_files(folder, origin)
    hf_config = read_hf_config(folder)
    teacher = None
    if (folder / TEACHER).is_dir():
        teacher = TeacherFolder(folder=folder / TEACHER, hf_config=read_hf_config(folder / TEACHER))
    return TowerPaths(image_folder=folder, text_folder=folder, hf_config=hf_config, teacher=teacher)


def save_model_files(workdir: AnyPath, model: Model) -> None:
    """Write config, tokenizer and image processor of the model into the run folder, but no weights.

    Every start before the first checkpoint writes them again, because it may have other towers.
    """
    folder = model_folder(workdir)
    if not is_primary() or complete_steps(workdir):
        return
    # Files of other towers must not mix with the new ones.
    remove_folder(folder)
    with written_locally(folder) as local:
        local.mkdir(exist_ok=True)
        _write_model_files(local, model)


def _write_model_files(folder: Path, model: Model) -> None:
    processors = model.processors
    save_tokenizer(processors.tokenizer, folder)
    image_size = model.config.data.image_size
    load_processor(model.paths.image_folder, image_size=image_size).save_pretrained(folder)
    if model.paths.teacher and processors.teacher_tokenizer:
        save_tokenizer(processors.teacher_tokenizer, folder / TEACHER)
        write_json(folder / TEACHER / "config.json", model.paths.teacher.hf_config)
        check_saved(processors.teacher_tokenizer, folder / TEACHER)
    write_json(folder / "config.json", model.hf_config)
    # The check follows config.json, because transformers chooses the tokenizer's class by it.
    check_saved(processors.tokenizer, folder)
    write_json(folder / MODEL_SUMS, _file_sums(folder))


def _file_sums(folder: Path) -> dict[str, int]:
    """Return the checksum (CRC-32) of each file below a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): zlib.crc32(file.read_bytes())
        for file in files
        if file != folder / MODEL_SUMS
    }


def _check_model_files(folder: Path, origin: AnyPath) -> None:
    """Raise UserError if a file of the model's folder differs from its checksum, or is missing.

    `origin` is the folder in messages, of which `folder` may be a copy.
    """
    file = origin / MODEL_SUMS
    if not (folder / MODEL_SUMS).exists():
        log.warning(
            "%s is missing, so the other files there are not compared with checksums.", file
        )
        return
    try:
        stored, found = dict(parse_json((folder / MODEL_SUMS).read_bytes())), _file_sums(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or remove it.") from error
    # A file that was added changes nothing that the run has written.
    changed = [name for name, checksum in stored.items() if found.get(name) != checksum]
    if changed:
        raise UserError(
            f"{origin / changed[0]} is not as the run wrote it; restore it, or remove {file} to accept "
            "the files as they are."
        )


def save_parameter_table(workdir: AnyPath, model: Model) -> None:
    """Write parameters.txt: which parameters train, how fast, and how they are split over the mesh."""
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(model.abstract).items()}
    trained = sum(size for path, size in sizes.items() if model.policy.trainable[path])
    log.info(
        "%.2fM of %.2fM parameters train, on %d devices.",
        trained / 1e6,
        sum(sizes.values()) / 1e6,
        model.mesh.size,
    )
    if is_primary():
        atomic_write(workdir / "parameters.txt", model.policy.table(model.abstract))


def read_config(workdir: AnyPath) -> Config | None:
    """Return the resolved config of a run folder, None for a folder without one.

    An earlier format is accepted here, and today's defaults replace missing keys. `check_workdir` decides
    whether the run may continue.

    Raises UserError if the file is damaged or does not belong to a run.
    """
    content = _read_config_file(workdir)
    if content is None:
        return None
    # A config.json of Hugging Face always has this key, and that of a run never.
    if "model_type" in content:
        raise UserError(
            f"{workdir} is the folder of a model and not of a run; give it as the --model of evaluate, or "
            "choose another --workdir."
        )
    if missing := [key for key in _ALWAYS if key not in content]:
        raise UserError(
            f"{workdir / 'config.json'} is damaged (it lacks {', '.join(missing)}); restore it, or choose "
            "another --workdir."
        )
    # Earlier versions have other names for some keys and values.
    config = {
        RENAMED.get(key, key): _RENAMED_VALUES.get(value, value) if key in RENAMED else value
        for key, value in content.items()
        if key not in _NOT_CONFIG
    }
    if isinstance(optimizer := config.get("optimizer"), dict):
        unused = _UNUSED_FIELDS.get(str(optimizer.get("name")), ())
        config["optimizer"] = {k: v for k, v in optimizer.items() if k not in unused}
    try:
        return parse(config)
    except UserError as error:
        text = str(error).removesuffix(".")
        raise UserError(
            f"{workdir / 'config.json'} does not fit this version of lit_jax ({text}); choose another "
            "--workdir."
        ) from error


def _read_config_file(workdir: AnyPath) -> dict[str, Any] | None:
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or choose another --workdir."
        ) from error


def check_workdir(
    workdir: AnyPath, config: Config, allowed_changes: Collection[str]
) -> Collection[str]:
    """Return the keys in which `config` differs from the config of the run in `workdir`, if there is a run.

    Raises UserError if the run has another format, or if a key that would change the result differs and is
    not in `allowed_changes`.
    """
    previous = read_config(workdir)
    if previous is None:
        return ()
    _check_format(workdir)
    changes = changed_keys(previous, config)
    refused = {key: text for key, text in changes.items() if key not in allowed_changes}
    if refused:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(refused.values())}); choose another "
            f"--workdir, or continue with the change by --allow_changes={','.join(refused)}."
        )
    # The user has permitted this change, but may expect more of it than it does.
    if complete_steps(workdir) and (moved := changes.keys() & TOWER_KEYS):
        log.warning(
            "%s holds a copy of the run's towers, and training continues with that copy; the new %s is only "
            "recorded.",
            workdir,
            " and ".join(sorted(moved)),
        )
    return changes


def _check_format(workdir: AnyPath) -> None:
    """Raise UserError if another version must finish the run in `workdir`, because its defaults differ."""
    content = _read_config_file(workdir) or {}
    # A folder without a format number has format 1.
    if (found := content.get("format", 1)) == FORMAT:
        return
    version = content.get("version", _WITHOUT_FORMAT)
    raise UserError(
        f"{workdir} holds a run of lit_jax {version} (folder format {found}), and this is lit_jax "
        f"{__version__} (format {FORMAT}), whose defaults differ. Finish the run with lit_jax {version}, or "
        "choose another --workdir; evaluate and export still read it."
    )


def check_passed(
    workdir: AnyPath, passed: Mapping[str, Any], allowed_changes: Collection[str]
) -> None:
    """Raise UserError if the passed objects differ from those that the run was started with.

    Args:
        passed: the description of each object, by its name in `fit`.
        allowed_changes: the names of objects that may differ.
    """
    content = _read_config_file(workdir)
    if content is None:
        return
    known = content.get("passed", {})
    # Names on either side count, because an object may be passed now but not at the start, or the reverse.
    changed = {
        name
        for name in {*known, *passed} - {*allowed_changes}
        if known.get(name) != passed.get(name)
    }
    # The first difference is reported; the others show once it is gone.
    for name in sorted(changed):
        before, now = (_name(one.get(name)) for one in (known, passed))
        raise UserError(
            f"{workdir} was started with another value of {name} ({before}) than the present one ({now}); "
            "pass the original one, choose another --workdir, or continue with the present one by "
            f"--allow_changes={name}."
        )


def _name(description: Any) -> str:
    if description is None:
        return "none was passed"
    if isinstance(description, Mapping) and "module" in description:
        return f"{description['module']}.{description['name']}"
    # A container describes the functions of an optax transformation, or towers by their sides.
    parts = description.values() if isinstance(description, Mapping) else description
    return " and ".join(map(_name, parts))


def save_config(workdir: AnyPath, config: Config, passed: Mapping[str, Any]) -> None:
    """Write the resolved config; call this function only when the run can certainly start with it."""
    if is_primary():
        header = {"format": FORMAT, "version": __version__}
        header |= {"passed": passed} if passed else {}
        write_json(workdir / "config.json", header | dataclasses.asdict(config))
