"""Write a tower or a dual encoder as a Hugging Face folder.

The folder is written under a temporary name and then renamed, so that a folder with the right name is
complete. An earlier export is replaced; any other folder that is not empty is left alone. With
`beside_others` the files are moved one by one into a folder that may hold other files, as in transformers; a
model there is replaced only if it is of the same class, or an earlier export.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util

from lit_jax.errors import UserError
from lit_jax.files import local_path, parse_json
from lit_jax.models.bert import with_counted_positions
from lit_jax.models.dual_encoder import DualEncoderModule
from lit_jax.models.tower import Tower
from lit_jax.trees import flatten
from lit_jax.weights import files, load, name_tables, names
from lit_jax.weights import vision_text_dual_encoder as vtde
from lit_jax.weights.hub import OWN_TYPE
from lit_jax.weights.vision_text_dual_encoder import Params

log = logging.getLogger(__name__)

# transformers requires the first key; the second one marks a file that a later export may replace.
_METADATA = {"format": "pt", "maker": "lit_jax"}


@runtime_checkable
class Saveable(Protocol):
    """A transformers processor, tokenizer or image processor."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files into a folder."""
        ...


def save_tower(
    folder: str | pathlib.Path,
    hf_config: Mapping[str, Any],
    module: Tower,
    params: Params,
    processor: Saveable | None = None,
    pooler: Params | None = None,
    *,
    beside_others: bool = False,
) -> None:
    """Write a tower: config.json, model.safetensors with torch's names, and the processor's files.

    `params` and `pooler` come from `load_tower_and_pooler`. A tower without a pooler is written without one,
    with a warning: most of transformers' classes load it with add_pooling_layer=False. Raises UserError if
    `folder` cannot be written or holds something else.
    """
    family = name_tables.FAMILIES[module.config.model_type]
    hf_config, params = _as_pytorch_counts(hf_config, module, {**params, **(pooler or {})})
    config = {
        **hf_config,
        "architectures": [family.architecture],
        "dtype": "float32",
        "lit_jax": {"pooling": module.pooling},
    }
    # SigLIP's config can tell transformers that the tower has no pooler; the other families need a warning.
    if hasattr(module.config, "vision_use_head"):
        config["vision_use_head"] = "head" in params
    elif lacking := _lacking(module, params, family):
        log.warning(
            "%s has no %s, because the tower has none with pooling %r, so transformers will draw them at "
            "random (most of its classes accept add_pooling_layer=False).",
            folder,
            " and no ".join(lacking),
            module.pooling,
        )
    with _new_folder(local_path("folder", str(folder)), beside_others) as new:
        _write_json(new / "config.json", config)
        tensors = names.to_tensors(flatten(_float32(params)), family, "torch")
        _write_torch(new, {_inner(family) + name: array for name, array in tensors.items()})
        if processor is not None:
            processor.save_pretrained(str(new))


def _lacking(module: Tower, params: Params, family: name_tables.Family) -> list[str]:
    """Return the names of the pooler's tensors that the family has and `params` lacks."""
    if family.pooler == name_tables.Family.pooler:
        return []
    whole = load.parameter_shapes(module.clone(pooling="pooler"), module.example_input)
    missing = {name: part for name, part in whole.items() if name not in params}
    return [
        slot.name
        for path, leaf in flatten(missing).items()
        for slot in names.target_slots(path, leaf.shape, family, "torch")[0]
    ]


def save_dual_encoder(
    folder: str | pathlib.Path,
    hf_config: Mapping[str, Any],
    module: DualEncoderModule,
    params: Params,
    processor: Saveable | None = None,
    *,
    beside_others: bool = False,
) -> None:
    """Write a dual encoder that transformers' class for `hf_config['model_type']` loads.

    The files are config.json, model.safetensors with torch's names, flax_model.msgpack if transformers 4 has
    a Flax class, and those of the processor. `hf_config` has the form that `load_dual_encoder` returns. A
    model that VisionTextDualEncoder cannot compute (`why_not_exportable`) is written for lit_jax alone, with
    a model_type that transformers refuses, and a warning gives the reason. Raises UserError if `folder`
    cannot be written or holds something else.
    """
    params, config = _float32(params), dict(hf_config)
    # No class of transformers counts positions from 0, so the rows of the position table are moved instead.
    config["text_config"], params["text_model"] = _as_pytorch_counts(
        config["text_config"], module.text_model, params["text_model"]
    )
    if hf_config["model_type"] in ("vision-text-dual-encoder", OWN_TYPE):
        config = _vision_text_config(config, module, params)
        if reason := vtde.why_not_exportable(module):
            config["model_type"] = OWN_TYPE
            # The bias is in config.json.
            params.pop("logit_bias", None)
            log.warning(
                "Only lit_jax can read %s, because transformers' VisionTextDualEncoder cannot represent "
                "this model: %s.",
                folder,
                reason,
            )
        else:
            config["model_type"] = "vision-text-dual-encoder"
            settings = vtde.Settings.from_module(module)
            params = vtde.to_vision_text_dual_encoder(params, settings, module.projection_dim)
    system = name_tables.SYSTEMS[config["model_type"]]
    config |= {"architectures": [system.architecture], "dtype": "float32"}
    with _new_folder(local_path("folder", str(folder)), beside_others) as new:
        _write_json(new / "config.json", config)
        _write_torch(new, _dual_encoder_tensors(module, params, system, "torch"))
        if system.in_flax:
            _write_flax(new, _dual_encoder_tensors(module, params, system, "flax"))
        if processor is not None:
            processor.save_pretrained(str(new))


def _vision_text_config(
    hf_config: Mapping[str, Any], module: DualEncoderModule, params: Params
) -> dict[str, Any]:
    """Return the config of a VisionTextDualEncoder, with our settings under 'lit_jax'."""
    settings = vtde.Settings.from_module(module)
    vision_config = {**hf_config["vision_config"], "dtype": "float32"}
    # The pooler that replaces CLS pooling is scaled for tanh, whatever activation the tower had.
    if settings.image_pooling == "cls" and "pooler_act" in vision_config:
        vision_config["pooler_act"] = "tanh"
        vision_config["pooler_output_size"] = vision_config["hidden_size"]
    config = {
        **hf_config,
        "vision_config": vision_config,
        "text_config": {**hf_config["text_config"], "dtype": "float32"},
        "projection_dim": module.projection_dim,
        "logit_scale_init_value": module.logit_scale_init,
        "lit_jax": dataclasses.asdict(settings),
    }
    config.pop("logit_bias", None)
    # transformers' class has no bias, which shifts all logits equally and changes no ranking.
    if "logit_bias" in params:
        config["logit_bias"] = float(params["logit_bias"])
    return config


def _as_pytorch_counts(
    hf_config: Mapping[str, Any], tower: Tower, params: Params
) -> tuple[dict[str, Any], Params]:
    """Return the config and parameters of the same tower with positions counted as in PyTorch."""
    counted, moved = with_counted_positions(tower.config, params)
    if counted is tower.config:
        return dict(hf_config), params
    kept = {name: value for name, value in hf_config.items() if name != "position_ids"}
    return {**kept, "max_position_embeddings": counted.max_position_embeddings}, dict(moved)


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda array: np.asarray(array).astype(np.float32, copy=False), params)


def _dual_encoder_tensors(
    module: DualEncoderModule, params: Params, system: name_tables.Family, layout: names.Layout
) -> dict[str, np.ndarray]:
    heads = dict(params)
    tensors = {}
    for part, tower in module.towers.items():
        family = name_tables.FAMILIES[tower.config.model_type]
        of_tower = names.to_tensors(flatten(heads.pop(part)), family, layout)
        # The towers of a VisionTextDualEncoder are whole models, with the prefixes of such a model's file.
        prefix = f"{part}." + (_inner(family) if system.holds_any_tower else "")
        for name, array in of_tower.items():
            tensors[names.renamed(prefix + name, system.modules)] = array
    return tensors | names.to_tensors(flatten(heads), system, layout)


def _inner(family: name_tables.Family) -> str:
    """Return the prefix that transformers 4 expects in a file of a CLIP or SigLIP tower alone, else ''."""
    return family.prefix if family.prefix in ("vision_model.", "text_model.") else ""


def _write_torch(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    # safetensors writes an array's memory as it lies, so a transposed view must be copied.
    whole = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    safetensors.numpy.save_file(whole, folder / "model.safetensors", _METADATA)
    # safetensors creates a file that only its owner may read, against the umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_flax(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    tree = traverse_util.unflatten_dict(tensors, sep=".")
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_folder(target: pathlib.Path, beside_others: bool) -> Iterator[pathlib.Path]:
    """Yield a new folder that replaces `target` when the block succeeds, and is removed when it fails.

    With `beside_others`, or if `target` is empty, the files are moved into `target` instead: `target` may be
    a mount point, which cannot be renamed.
    """
    # Resolved, because '.' has no name to build on, and a symbolic link has to stay a link.
    target = target.resolve()
    name = f".{target.name}-{uuid.uuid4().hex}"
    new, old = target.with_name(name), target.with_name(f"{name}.old")
    try:
        # An empty folder is filled instead of replaced: it may be a mount point.
        stays = target.is_dir() and (beside_others or not any(target.iterdir()))
        if stays:
            new = target / name
        new.mkdir(parents=True)
        yield new
        if stays:
            _move_into(target, new)
            return
        # The old export is renamed first: `rename` does not replace a folder that is not empty.
        if target.exists():
            _check_replaceable(target, new)
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{target} cannot be written ({error}); give a folder with permission and space to write."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_into(target: pathlib.Path, new: pathlib.Path) -> None:
    """Move the files of `new` into `target` one by one, and then remove the earlier weights.

    Raises UserError if `target` holds another kind of model.
    """
    # Listed before the move, which makes new and old weights indistinguishable.
    weights = files.weights_in(target)
    if weights or (target / "config.json").exists():
        _check_same_class(target, new)
    # config.json comes last, because a new folder without it is not taken for a model.
    moved = sorted(new.iterdir(), key=lambda file: file.name == "config.json")
    for file in moved:
        file.replace(target / file.name)
    before = weights.keys() - {file.name for file in moved}
    if variants := sorted(name for name in before if weights[name]):
        log.warning(
            "%s still has other variants of the weights from before (%s); remove them, unless variant=%r "
            "should still load them.",
            target,
            ", ".join(variants),
            weights[variants[0]],
        )
    # An index is removed before its shards, so that an incomplete model is never taken for a whole one.
    for name in sorted(before - {*variants}, key=lambda name: not name.endswith(".json")):
        (target / name).unlink()


def _check_same_class(target: pathlib.Path, new: pathlib.Path) -> None:
    """Raise UserError unless `target` holds an export, or a model of the same class as `new`.

    Otherwise a tower could replace a model with a head, whose weights would be lost.
    """
    if _is_export(target):
        return
    (there_type, there), (own_type, own) = map(_read_class, (target, new))
    if there_type != own_type or (there and there != own):
        raise UserError(
            f"{target} holds a {there or there_type or 'model'} that lit_jax did not write, and this is a "
            f"{own}; give another folder, or remove that model."
        )


def _read_class(folder: pathlib.Path) -> tuple[str, str]:
    """Return the model_type and the PyTorch class in a folder's config.json, each '' if it is missing."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
        model_type, names_ = str(config.get("model_type", "")), config.get("architectures")
        return model_type, str(names_[0]).removeprefix("Flax") if names_ else ""
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return "", ""


def _check_replaceable(target: pathlib.Path, new: pathlib.Path) -> None:
    """Raise UserError unless `target` is empty, or an export whose files `new` all has."""
    present = {file.name for file in target.iterdir()}
    foreign = sorted(present - {file.name for file in new.iterdir()})
    if present and (foreign or not _is_export(target)):
        raise UserError(
            f"{target} holds {foreign[0] if foreign else 'a model'}, which no export of lit_jax wrote; give "
            "another folder."
        )


def _is_export(folder: pathlib.Path) -> bool:
    # The mark in config.json covers an export whose weights are missing.
    try:
        with safetensors.safe_open(folder / "model.safetensors", "np") as content:
            if (content.metadata() or {}).get("maker") == _METADATA["maker"]:
                return True
        return "lit_jax" in parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError, safetensors.SafetensorError):
        return False
