"""Load the parameters of a tower or a dual encoder from a Hugging Face folder.

Every parameter of the module and every tensor of the file is accounted for, see matching.py.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import (
    SYSTEMS,
    TOWERS,
    DualEncoderModule,
    Side,
    build_dual_encoder,
    build_system,
)
from lit_jax.models.families import VISION
from lit_jax.models.tower import Tower
from lit_jax.weights import files, hub, name_tables
from lit_jax.weights import vision_text_dual_encoder as vtde
from lit_jax.weights.matching import LoadReport, StateDictMatcher, shortened_names
from lit_jax.weights.other_libraries import sentence_pooling
from lit_jax.weights.vision_text_dual_encoder import Params

log = logging.getLogger(__name__)

# The names of heads, which turn pooled features into an embedding or into class logits.
_HEAD = re.compile(r"(^|\.)((visual|text)_projection|\w*classifier)\.")


def tower_side(module: Tower) -> Side:
    """Return the side of a dual encoder that this tower can be."""
    return "image" if module.config.model_type in VISION else "text"


def load_tower(folder: str | pathlib.Path, module: Tower) -> tuple[Params, LoadReport]:
    """Load the parameters of a tower in float32, and a report of the load.

    The folder holds a base model, a model with a head, or a dual encoder with such a tower. Raises UserError
    if the model is of another family, or if its weights cannot be read or do not fit `module` one to one.
    """
    return _take_tower(_open_tower(folder, module), module)


def load_tower_and_pooler(
    folder: str | pathlib.Path, module: Tower, *, variant: str | None = None
) -> tuple[Params, Params]:
    """Load a tower as `load_tower` does, and the parameters of a pooler that `module` does not use.

    Saving the pooler again keeps the tower complete for transformers. The weights are read once.
    """
    file = _open_tower(folder, module, variant)
    params, _ = _take_tower(file, module)
    # SigLIP's config can say that the checkpoint has no pooler.
    has_none = "pooler" not in module.poolings or not getattr(
        module.config, "vision_use_head", True
    )
    if module.pooling == "pooler" or has_none:
        return params, {}
    whole = parameter_shapes(module.clone(pooling="pooler"), module.example_input)
    pooler = {name: part for name, part in whole.items() if name not in params}
    matcher = StateDictMatcher(file.tensors)
    taken = matcher.take(pooler, file.family, prefix=file.prefix)
    # Files of classifiers usually have no pooler.
    if matcher.used == 0:
        return params, {}
    # `close` still raises for a pooler that is incomplete or mismatched.
    matcher.ignore(matcher.remaining())
    matcher.close()
    return params, taken


class _TowerFile(NamedTuple):
    """The weights of a folder that holds a tower, alone or in a dual encoder.

    Attributes:
        architecture: the class that config.json names.
        prefix: the prefix of the tower's tensors in a dual encoder, else ''.
    """

    tensors: files.Tensors
    family: name_tables.Family
    side: Side
    architecture: str
    prefix: str


def _open_tower(
    folder: str | pathlib.Path, module: Tower, variant: str | None = None
) -> _TowerFile:
    side, hf_config = tower_side(module), hub.read_config(folder)
    own_config = hub.tower_part(hf_config, side)
    found = own_config["model_type"]
    if found != module.config.model_type:
        raise UserError(
            f"{folder} holds a model of type {found}, but this tower is a {module.config.model_type}; set "
            f"config.model.{side}.model to a {module.config.model_type}."
        )
    tensors = files.read_tensors(folder, variant)
    # Only Flax dual encoders counted positions differently; Flax text towers alone counted like PyTorch.
    if hf_config["model_type"] in SYSTEMS:
        _warn_of_positions(module.config, tensors, hf_config, own_config)
    elif side == "text":
        _warn_of_pooling(pathlib.Path(folder), module)
    return _TowerFile(
        tensors,
        name_tables.FAMILIES[found],
        side,
        " ".join(hf_config.get("architectures") or (hf_config["model_type"],)),
        f"{TOWERS[side]}_model." if hf_config["model_type"] in SYSTEMS else "",
    )


def _take_tower(file: _TowerFile, module: Tower) -> tuple[Params, LoadReport]:
    matcher = StateDictMatcher(file.tensors)
    params = matcher.take(
        parameter_shapes(module, module.example_input),
        file.family,
        prefix=file.prefix,
        has_pooler=module.pooling == "pooler",
    )
    # A missing pooler has a remedy of its own, so it is reported before `close` lists all differences.
    bare = [name.removeprefix(file.prefix) for name in matcher.missing]
    if pooler := [name for name in bare if re.match(file.family.pooler, name)]:
        poolings = " or ".join(repr(name) for name in module.poolings if name != "pooler")
        raise UserError(
            f"{matcher.file} has no pooler weights ({file.prefix}{pooler[0]}), and a random pooler would be "
            f"worse than none; set the {file.side} tower's pooling (config.model.{file.side}.pooling) to "
            f"{poolings}."
        )
    # With a prefix, the file is that of a dual encoder, whose other parts are not wanted here.
    if file.prefix:
        matcher.ignore(matcher.remaining())
    report = matcher.close()
    if not file.prefix and (head := [name for name in report.ignored if _HEAD.search(name)]):
        log.warning(
            "%s is a %s, whose head (%s) is not part of a tower: the pooled output is the input of that "
            "head.",
            report.file,
            file.architecture,
            shortened_names(head),
        )
    return params, report


def load_dual_encoder(
    folder: str | pathlib.Path,
    *,
    dtype: Any,
    hf_config: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> tuple[DualEncoderModule, Params, dict[str, Any], LoadReport]:
    """Load a dual encoder: return its module, its float32 parameters, its config and a report of the load.

    Poolings and projections that `save_dual_encoder` expressed by other weights are restored bit for bit.
    `dtype` is the dtype of the computation. `hf_config` replaces the folder's config.json. Raises UserError
    if the folder holds another kind of model, and in the cases of `load_tower`.
    """
    hf_config = dict(hub.read_config(folder) if hf_config is None else hf_config)
    if hf_config["model_type"] not in SYSTEMS:
        raise UserError(
            f"{folder} holds a model of type {hf_config['model_type']}, which is not a dual encoder; lit_jax "
            f"has {', '.join(SYSTEMS)}."
        )
    # The module is built first: a broken config is reported before gigabytes are read.
    module, tensors = (
        dual_encoder_module(hf_config, dtype=dtype),
        files.read_tensors(folder, variant),
    )
    _warn_of_positions(module.text_model.config, tensors, hf_config, hf_config["text_config"])
    if "lit_jax" not in hf_config or hf_config["model_type"] == hub.OWN_TYPE:
        params, report = _take_dual_encoder(module, tensors, hf_config)
    # An export for transformers has the weights of a plain VisionTextDualEncoder, so it is read as one first.
    else:
        plain = build_system(hf_config, dtype=dtype)
        as_written, report = _take_dual_encoder(plain, tensors, hf_config)
        settings = vtde.Settings.from_config(hf_config)
        # None if another program has trained the export further, so that nothing can be undone.
        params = vtde.from_vision_text_dual_encoder(as_written, settings, module.projection_dim)
        if params is None:
            module, params = plain.clone(logit_bias_init=module.logit_bias_init), as_written
            note = (
                "trained on after its export, so it keeps the poolers and projections of the export"
            )
            report = dataclasses.replace(report, note=note)
    if (bias := hf_config.get("logit_bias")) is not None:
        params["logit_bias"] = np.asarray(bias, np.float32)
    return module, params, hf_config, report


def _warn_of_pooling(folder: pathlib.Path, tower: Tower) -> None:
    """Warn if sentence-transformers pools the model in `folder` differently than `tower` does."""
    found = sentence_pooling(folder)
    if found is None or (found.modes == (tower.pooling,) and not found.layers):
        return
    mode = "+".join(found.modes)
    layers = f" and then applies {', '.join(found.layers)}" if found.layers else ""
    if mode == tower.pooling:
        remedy = "the tower leaves that out"
    elif mode in tower.poolings:
        remedy = f"to pool alike, set its pooling (config.model.text.pooling) to {mode!r}"
    else:
        remedy = "the tower has no such pooling"
    log.warning(
        "%s is a model of sentence-transformers, which pools it by %r%s, but this text tower has the "
        "pooling %r; %s.",
        folder,
        mode,
        layers,
        tower.pooling,
        remedy,
    )


def _warn_of_positions(
    tower: Any, tensors: files.Tensors, hf_config: Mapping[str, Any], text_config: Mapping[str, Any]
) -> None:
    """Warn if a file does not show from which number its text tower counted positions in training.

    `tower` is our config of the text tower, `hf_config` the config of the dual encoder.
    """
    is_flax = tensors.file.name.startswith("flax_model") and "lit_jax" not in hf_config
    # Only towers that count from the padding id are affected.
    counts = getattr(tower, "position_ids", None) == "input_ids"
    if is_flax and counts and "position_ids" not in text_config:
        log.warning(
            "%s is of a Flax dual encoder, and those gave a %s the positions 0, 1, 2 ... in training, where "
            "PyTorch's counts from the padding id + 1 on, as is done now. If this model was trained in "
            "Flax, choose 'arange' (text_config={'position_ids': 'arange'} in Python, --position_ids=arange "
            "of evaluate, config.model.text.overrides.position_ids); 'input_ids' there chooses PyTorch's.",
            tensors.file,
            tower.model_type,
        )


def dual_encoder_module(hf_config: Mapping[str, Any], *, dtype: Any) -> DualEncoderModule:
    """Return the module of `load_dual_encoder`, except for an export that was trained further."""
    if "lit_jax" not in hf_config:
        return build_system(hf_config, dtype=dtype)
    settings = vtde.Settings.from_config(hf_config)
    bias = hf_config.get("logit_bias")
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float)):
        raise UserError(
            f"logit_bias in the model's config.json is {bias!r}; it must be of type float."
        )
    # The settings of an export are those of a recipe, so the same builder makes the module.
    config = ModelConfig(
        image=TowerConfig(pooling=settings.image_pooling, projection=settings.image_projection),
        text=TowerConfig(pooling=settings.text_pooling, projection=settings.text_projection),
        projection_dim=hf_config["projection_dim"],
        logit_scale_init=hf_config["logit_scale_init_value"],
        logit_bias_init=bias,
    )
    module = build_dual_encoder(hf_config["vision_config"], hf_config["text_config"], config)
    return module.with_dtype(dtype)


def _take_dual_encoder(
    module: DualEncoderModule, tensors: files.Tensors, hf_config: Mapping[str, Any]
) -> tuple[Params, LoadReport]:
    """Return the parameters of both towers, of the projections and of the logits, and the report."""
    shapes = parameter_shapes(module, module.example_batch)
    # An export keeps the bias in config.json instead of a tensor.
    if "logit_bias" in hf_config:
        shapes.pop("logit_bias", None)
    matcher = StateDictMatcher(tensors)
    params = {}
    for part, tower in module.towers.items():
        params[part] = matcher.take(
            shapes.pop(part),
            name_tables.FAMILIES[tower.config.model_type],
            prefix=f"{part}.",
            has_pooler=tower.pooling == "pooler",
        )
    params |= matcher.take(shapes, name_tables.SYSTEMS[hf_config["model_type"]])
    return params, matcher.close()


def parameter_shapes(module: nn.Module, example: Any) -> dict[str, Any]:
    """Return the tree of parameters as jax.ShapeDtypeStructs, without computing anything.

    Raises UserError if the numbers in config.json describe no model that can be computed.
    """
    key = jax.random.key(0)
    with config_errors():
        try:
            hash(module)
        # A user's own tower may have lists and dicts.
        except TypeError:
            return dict(jax.eval_shape(module.init, key, example)["params"])
        return dict(_init.eval_shape(module, key, example)["params"])


# Traced once for each module and shape of inputs: a start asks for the same tower several times.
@functools.partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, key: jax.Array, example: Any) -> Any:
    return module.init(key, example)


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turn an error in tracing a module into UserError: the config's numbers then describe no model."""
    try:
        yield
    # No number of a config leads to a missing name: the module itself has a mistake.
    except (UserError, NameError, AttributeError):
        raise
    # The causes are as varied as an attention without heads or a patch of 0 pixels.
    except Exception as error:
        raise UserError(
            "The config.json of a tower, with the overrides, does not describe a valid model "
            f"({files.one_line(error)}); correct its numbers."
        ) from error
