"""Where a model's files are: a local folder, or a copy of a Hugging Face Hub repository."""

import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub
from transformers import AutoConfig

from lit_jax.config_keys import nearest
from lit_jax.errors import UserError
from lit_jax.files import parse_json
from lit_jax.models.dual_encoder import SYSTEMS, TOWERS, Side
from lit_jax.models.families import TEXT, VISION, tower_config, tower_fields, unknown
from lit_jax.weights.files import FORMATS, one_line

# The model_type of a dual encoder of ours that transformers has no class for; else a VisionTextDualEncoder.
OWN_TYPE = "lit_jax"
# Of FlaxHybridCLIP, which became VisionTextDualEncoder.
_FORMER_TYPES = {"hybrid-clip": "vision-text-dual-encoder"}
_OWN_TYPES = {*VISION, *TEXT, *SYSTEMS, *_FORMER_TYPES}
# Configs, tokenizers, image processors, indices of sharded weights.
_SMALL_FILES = ("*.json", "*.txt", "*.model")
_TIMEOUT = 10  # seconds


def local_folder(model: str, *, config_key: str) -> pathlib.Path:
    """The folder that `model` names, or a copy of the Hub repository it names: what is in the cache of
    huggingface_hub is not fetched again, and is taken as it is when the Hub cannot be reached.

    Raises UserError, naming `config_key`, if `model` is neither or cannot be had.
    """
    if not model:
        raise UserError(f"{config_key} is empty; give a local folder or the id of a Hub model.")
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return _download(model)
    except Exception as error:  # no network, no such model, no permission: every cause has a class
        reason = error
    try:
        cached = huggingface_hub.snapshot_download(
            model, allow_patterns=list(_SMALL_FILES), local_files_only=True
        )
    except (OSError, ValueError):  # not in the cache; not the form of an id
        raise UserError(
            f"{config_key} is {model!r}, which is no folder here and cannot be had from the Hugging "
            f"Face Hub ({one_line(reason)}); set {config_key} to a local folder with the model's files."
        ) from reason
    return pathlib.Path(cached)


def _download(model: str) -> pathlib.Path:
    """Fetches the small files and the weights in the first format that the repository has."""
    info = huggingface_hub.HfApi().model_info(model, timeout=_TIMEOUT)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    patterns = [*_SMALL_FILES]
    for format_ in FORMATS:
        if files & {format_.file, format_.index}:
            patterns += [format_.file, format_.shards]
            break
    return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The content of config.json, completed with transformers' defaults for its `model_type`.

    Raises UserError if there is none, none that transformers understands, or of a kind of model that is
    none of ours.
    """
    file = pathlib.Path(folder) / "config.json"
    try:
        return complete(parse_json(file.read_bytes()))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file} is missing; give the folder of a Hugging Face model.") from None
    except Exception as error:  # each of transformers' configs checks its fields in its own way
        raise UserError(
            f"{file} is not a config.json that transformers understands ({one_line(error)}); take the one "
            "that belongs to the model."
        ) from error


def complete(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json with transformers' defaults for its `model_type`.

    Raises UserError if that, or the one of a tower in it, is none of ours.
    """
    content = dict(content)
    parts = (content.get(f"{tower}_config") or {} for tower in TOWERS.values())
    of_towers = (part.get("model_type") or None for part in parts)
    for kind in (content.get("model_type"), *of_towers):
        if isinstance(kind, str) and kind not in _OWN_TYPES:
            raise UserError(f"{unknown(kind)}; its dual encoders are {', '.join(SYSTEMS)}.")
    former: Any = content.pop("model_type")
    model_type = _FORMER_TYPES.get(former, former)
    config_type: Any = "vision-text-dual-encoder" if model_type == OWN_TYPE else model_type
    # Not AutoConfig.from_pretrained: it might run code of the repository, and towers are ours.
    content = AutoConfig.for_model(config_type, **content).to_dict()
    content.pop("_name_or_path", None)  # where it was read from, no part of the model
    for side, tower in TOWERS.items():
        part = f"{tower}_config"
        if part in content:  # that of a VisionTextDualEncoder may be the config of a whole CLIP
            content[part] = tower_part(content[part], side)
    return {**content, "model_type": model_type}


def read_tower_config(folder: str | pathlib.Path, side: Side) -> dict[str, Any]:
    """The config of a folder's tower: of the folder itself, or of its `side` if it is a dual encoder.

    Raises UserError as `read_config`.
    """
    return tower_part(read_config(folder), side)


def override(hf: Mapping[str, Any], changes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the config `hf` of a tower with `changes` of its fields, which messages call `prefix` and name.

    Raises UserError for a field that neither this kind of tower nor transformers' config has, and for a value
    that the field cannot have.
    """
    known = {*hf, *tower_fields(hf)}
    for name in changes:
        if name not in known:
            raise UserError(
                f"{prefix}{name} is not in the config.json of a {hf['model_type']}; {nearest(name, known)}."
            )

    def named(name: str) -> str:
        return prefix + name if name in changes else f"{name} in the model's config.json"

    config = tower_config({**hf, **changes}, named)
    # An int where the field is a float: transformers does not take it.
    floats = {name: getattr(config, name, None) for name in changes}
    changes = {**changes, **{name: x for name, x in floats.items() if isinstance(x, float)}}
    for name, value in changes.items():
        if not hasattr(config, name):
            _check_type({**hf, name: value}, prefix + name)
    return {**hf, **changes}


def _check_type(hf: dict[str, Any], named: str) -> None:
    """Raise UserError if transformers' config does not take the value of the field that is called `named`."""
    try:
        AutoConfig.for_model(hf.pop("model_type"), **hf)
    except Exception as error:  # each of transformers' configs checks its fields in its own way
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"{named} is not what transformers takes ({reason}); correct it."
        ) from error


def tower_part(hf_config: dict[str, Any], side: Side) -> dict[str, Any]:
    """Of the config of a dual encoder that of one tower; that of a tower as it is."""
    part = f"{TOWERS[side]}_config"
    return tower_part(hf_config[part], side) if part in hf_config else hf_config
