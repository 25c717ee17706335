"""The files of a model, from a local folder or a Hugging Face Hub repository, and its config.json."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub
from transformers import AutoConfig

from lit_jax.buckets import is_bucket
from lit_jax.config_schema import nearest
from lit_jax.errors import UserError
from lit_jax.files import expand_home, parse_json
from lit_jax.models.dual_encoder import SYSTEMS, TOWERS, Side
from lit_jax.models.families import TEXT, VISION, tower_config, tower_fields, unknown
from lit_jax.weights.bucket import cached_model
from lit_jax.weights.files import FORMATS, one_line
from lit_jax.weights.other_libraries import explain_config, explain_folder

# The model_type of our dual encoders for which transformers has no class; others are VisionTextDualEncoders.
OWN_TYPE = "lit_jax"
# FlaxHybridCLIP was renamed to VisionTextDualEncoder.
_FORMER_TYPES = {"hybrid-clip": "vision-text-dual-encoder"}
_OWN_TYPES = {*VISION, *TEXT, *SYSTEMS, *_FORMER_TYPES}
# Patterns of configs, tokenizers, image processors, and indices of sharded weights.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.codes")
# Without a network, a copy in the cache is used. The user should not wait for this longer than a moment.
_TIMEOUT_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """The options that choose a copy of a model, with the names of transformers' from_pretrained.

    Attributes:
        revision: the branch, tag or commit of the Hub repository.
        token: the access token of a private repository.
        subfolder: the folder within the repository or local folder.
        variant: the variant of the weights' files: 'fp16' means model.fp16.safetensors.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | pathlib.Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None

    @property
    def download(self) -> dict[str, Any]:
        """The arguments of huggingface_hub's snapshot_download."""
        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        return {name: getattr(self, name) for name in names}


def local_folder(
    model: str, *, config_key: str, options: HubOptions = HubOptions()
) -> pathlib.Path:
    """Return the local folder that `model` names, or the folder of a copy of the Hub repository `model`.

    A folder in a bucket (gs://, s3://) is copied, too. Files in the cache of huggingface_hub are not
    downloaded again, and are used as they are if the Hub cannot be reached. Raises UserError, which names
    `config_key`, if `model` is neither a folder nor available.
    """
    if not model:
        raise UserError(f"{config_key} is empty; give a local folder or the id of a Hub model.")
    if is_bucket(model):
        folder = cached_model(model, config_key, functools.partial(_needed, options))
    elif not (folder := expand_home(model, f"{config_key}={model}")).is_dir():
        # The id of a Hub model has one slash at most. Its errors would hide that a path is mistyped.
        if folder.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise UserError(
                f"{config_key} is {model!r}, and there is no such folder; give the folder of a model, or the "
                "id of a Hub model."
            )
        folder = _from_hub(model, config_key, options)
    if not (folder / options.subfolder).is_dir():
        raise UserError(
            f"{config_key} is {model!r}, which has no folder {options.subfolder!r} in it; correct subfolder."
        )
    _refuse_pipes(folder / options.subfolder)
    return folder / options.subfolder


def _refuse_pipes(folder: pathlib.Path) -> None:
    """Raise UserError at a pipe or a device: a pipe would block its reader, and /dev/zero never ends."""
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(
                f"{file} is a pipe or a device, but a model's folder holds regular files alone; remove it."
            )


def _from_hub(model: str, config_key: str, options: HubOptions) -> pathlib.Path:
    """Return the folder of an up-to-date copy, or else of a cached copy."""
    reason = None
    if not options.local_files_only:
        try:
            return _download(model, options)
        # No network, no such model, no permission: each cause has an exception class of its own.
        except Exception as error:
            reason = error
    # Without a network the copy of an earlier run serves.
    cached = dataclasses.replace(options, local_files_only=True, force_download=False).download
    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=list(_SMALL_FILES), **cached
        )
    # An OSError means that the model is not in the cache, a ValueError that the name is not a valid id.
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config_key} is {model!r}, which is not a folder here and cannot be downloaded from the "
            f"Hugging Face Hub ({one_line(reason or error)}); set {config_key} to a local folder with the "
            "model's files."
        ) from (reason or error)
    return pathlib.Path(folder)


def _download(model: str, options: HubOptions) -> pathlib.Path:
    """Download the files that are needed of a repository."""
    info = huggingface_hub.HfApi(token=options.token).model_info(
        model, revision=options.revision, timeout=_TIMEOUT_SECONDS
    )
    patterns = _needed(options, {sibling.rfilename for sibling in info.siblings or ()})
    return pathlib.Path(
        huggingface_hub.snapshot_download(model, allow_patterns=patterns, **options.download)
    )


def _needed(options: HubOptions, files: set[str]) -> list[str]:
    """Return the patterns of the small files, and of the weights in the first of `FORMATS` among `files`."""
    above = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    small = [*_SMALL_FILES, *(above + pattern for pattern in _SMALL_FILES if above)]
    # A repository often has the same weights in several formats; downloading one saves gigabytes.
    for format_ in FORMATS:
        file, index = format_.file(options.variant), format_.index(options.variant)
        if files & {above + file, above + index}:
            return [*small, above + file, above + format_.shards(options.variant)]
    return small


def upload(folder: str | pathlib.Path, repo_id: str, **options: Any) -> str:
    """Upload a folder to a Hub repository, which is created if it is missing, and return the commit's URL.

    `options` are those of transformers' push_to_hub: token, private, revision, commit_message ...
    Raises UserError if the Hub refuses or cannot be reached.
    """
    token, private = options.pop("token", None), options.pop("private", None)
    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url
    # No network, no permission, no such option: each cause has an exception class of its own.
    except Exception as error:
        raise UserError(
            f"{repo_id!r} cannot be pushed to the Hugging Face Hub ({one_line(error)}); check the name, the "
            "network and the token (hf auth login, or token=...). save_pretrained writes to a folder."
        ) from error


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """Return the content of config.json, completed with transformers' defaults for its `model_type`.

    Raises UserError if there is no config.json, if transformers does not understand it, or if lit_jax does
    not have that kind of model.
    """
    file = pathlib.Path(folder) / "config.json"
    try:
        with _refusing(str(file)):
            content = parse_json(file.read_bytes())
    except FileNotFoundError:
        remedy = explain_folder(file.parent) or "give the folder of a Hugging Face model"
        raise UserError(f"{file} is missing; {remedy}.") from None
    return complete(content, str(file))


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn any error of transformers about a config into UserError, which names `what`."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    # Each of transformers' configs checks its fields in its own way.
    except Exception as error:
        raise UserError(
            f"{what} is not a config.json that transformers understands ({one_line(error)}); use the one "
            "that belongs to the model."
        ) from error


def complete(content: Any, what: str = "The config") -> dict[str, Any]:
    """Return the content of a config.json, completed with transformers' defaults for its `model_type`.

    `what` names the content in messages. Raises UserError if transformers does not understand it, or if
    lit_jax does not have that type or the type of one of its towers.
    """
    if isinstance(content, Mapping) and not content.get("model_type"):
        raise UserError(f"{what} {explain_config(content)}.")
    with _refusing(what):
        return _completed(dict(content))


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    # Unknown types are named here, before transformers would fail on them in words of its own.
    parts = (content.get(f"{tower}_config") or {} for tower in TOWERS.values())
    of_towers = (part.get("model_type") or None for part in parts)
    for kind in (content.get("model_type"), *of_towers):
        if isinstance(kind, str) and kind not in _OWN_TYPES:
            raise UserError(f"{unknown(kind)}; its dual encoders are {', '.join(SYSTEMS)}.")
    # Our own type has the fields of a VisionTextDualEncoder, so its class completes them.
    former: Any = content.pop("model_type")
    model_type = _FORMER_TYPES.get(former, former)
    config_type: Any = "vision-text-dual-encoder" if model_type == OWN_TYPE else model_type
    # Not AutoConfig.from_pretrained, which might run code of the repository.
    content = AutoConfig.for_model(config_type, **content).to_dict()
    # The path from which the config was read is not part of the model.
    content.pop("_name_or_path", None)
    for side, tower in TOWERS.items():
        part = f"{tower}_config"
        # The config of a tower in a VisionTextDualEncoder may be the config of a whole CLIP.
        if part in content:
            content[part] = tower_part(content[part], side)
    if former != model_type and "position_ids" in tower_fields(content["text_config"]):
        # FlaxHybridCLIP trained its text towers with the positions 0, 1, 2, ...
        content["text_config"].setdefault("position_ids", "arange")
    return {**content, "model_type": model_type}


def read_tower_config(folder: str | pathlib.Path, side: Side) -> dict[str, Any]:
    """Return the config of the tower in a folder, which holds the tower alone or a dual encoder.

    Raises UserError in the cases of `read_config`.
    """
    return tower_part(read_config(folder), side)


def override(hf: Mapping[str, Any], changes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the config `hf` of a tower with `changes` of its fields.

    Messages call a field `prefix` + name. Raises UserError for a field that neither this kind of tower nor
    transformers' config has, and for a value that the field cannot have.
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
    # transformers refuses an int for a float field; our config has converted it.
    floats = {name: getattr(config, name, None) for name in changes}
    changes = {**changes, **{name: x for name, x in floats.items() if isinstance(x, float)}}
    for name, value in changes.items():
        # Our config checks the fields that it has; transformers checks the others.
        if not hasattr(config, name):
            _check_type({**hf, name: value}, prefix + name)
    return {**hf, **changes}


def _check_type(hf: dict[str, Any], named: str) -> None:
    """Raise UserError, which calls the changed field `named`, if transformers' config refuses the values."""
    try:
        AutoConfig.for_model(hf.pop("model_type"), **hf)
    # Each of transformers' configs checks its fields in its own way.
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"{named} is not accepted by transformers ({reason}); correct it."
        ) from error


def tower_part(hf_config: dict[str, Any], side: Side) -> dict[str, Any]:
    """Return the config of one tower of a dual encoder, or the config itself if it is that of a tower."""
    part = f"{TOWERS[side]}_config"
    return tower_part(hf_config[part], side) if part in hf_config else hf_config
