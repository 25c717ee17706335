"""Fills the parameters of a tower or a dual encoder from a Hugging Face folder, accounting for both sides.

Every parameter of the module is filled and every tensor of the file is used, or is known to be of no
use to a tower (heads, buffers); otherwise loading fails and says what differs.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from lit_jax.config import ModelConfig, TowerConfig
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import DualEncoder, build_dual_encoder
from lit_jax.models.families import TEXT, VISION, Tower
from lit_jax.weights import dual_encoder_form, files, hub, names
from lit_jax.weights.dual_encoder_form import Params

DUAL_ENCODER = "vision-text-dual-encoder"
_FLOATS = {np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
_LISTED = 6  # of every kind of difference


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was read; `str()` is a line for the log."""

    file: pathlib.Path
    layout: names.Layout
    tensors: int  # that were used
    dtypes: tuple[str, ...]  # in the file
    ignored: tuple[str, ...]  # tensors of no use to a tower
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.tensors} {'/'.join(self.dtypes)} tensors with {self.layout} names from {self.file}"
        if self.ignored:
            text += f"; not used: {_listed(self.ignored)}"
        return f"{text}; {self.note}" if self.note else text


def model_type(module: nn.Module) -> str:
    """The `model_type` that config.json has for this kind of tower."""
    (name,) = (n for n, (_, kind) in {**VISION, **TEXT}.items() if isinstance(module, kind))
    return name


def config_key(module: nn.Module) -> str:
    """The group of config keys that describes this tower of a run."""
    return "config.model.image" if model_type(module) in VISION else "config.model.text"


def load_tower(folder: str | pathlib.Path, module: Tower) -> tuple[Params, LoadReport]:
    """The parameters of `module`, float32, from the folder of a base model or of a model with a head.

    Raises UserError if the folder holds a model of another family, if its weights do not fit
    `module` one to one, or if they cannot be read.
    """
    folder, key = pathlib.Path(folder), config_key(module)
    found = hub.read_config(folder)["model_type"]
    if found != model_type(module):
        raise UserError(
            f"{folder} holds a model of type {found}, where {key}.model needs {model_type(module)}"
            + (", and a dual encoder is no tower." if found == DUAL_ENCODER else ".")
        )
    family = names.FAMILIES[found]
    tensors = files.read_tensors(folder)
    has_pooler = module.pooling == "pooler"
    recognised = names.recognise(tensors.values, family, has_pooler=has_pooler)
    if has_pooler and not any(name.startswith("pooler.") for name in recognised.names):
        raise UserError(
            f"{tensors.file} has no pooler weights, and a random pooler would be worse than none; set "
            f"{key}.pooling to 'cls' or 'mean'."
        )
    expected = _expected(module, module.example_input)
    params = _fill(expected, tensors, recognised.names, [family.stack])
    return params, _report(tensors, recognised)


def load_dual_encoder(
    folder: str | pathlib.Path, *, dtype: Literal["float32", "bfloat16"]
) -> tuple[DualEncoder, Params, dict[str, Any], LoadReport]:
    """The module of a VisionTextDualEncoder folder, its parameters, its config.json and what was read.

    What `save_dual_encoder` had to express in other weights comes back bit by bit as it was. The
    parameters are float32; `dtype` is that of the computation.
    Raises UserError if the folder holds another kind of model, or as `load_tower` does.
    """
    hf_config = hub.read_config(folder)
    if hf_config["model_type"] != DUAL_ENCODER:
        raise UserError(
            f"{folder} holds a model of type {hf_config['model_type']}, not {DUAL_ENCODER}; give the "
            "folder of a dual encoder, such as lit_jax.export writes."
        )
    tensors = files.read_tensors(folder)
    plain = _build(hf_config, dual_encoder_form.PLAIN, dtype)
    recognised, stacks = _recognise_dual_encoder(tensors, plain)
    batch = {"pixel_values": plain.vision_model.example_input}
    batch |= dict.fromkeys(("input_ids", "attention_mask"), plain.text_model.example_input)
    params = _fill(_expected(plain, batch), tensors, recognised.names, stacks)
    report = _report(tensors, recognised)

    settings = dual_encoder_form.Settings.of_config(hf_config)
    original = dual_encoder_form.restore(params, settings, plain.projection_dim)
    if original is None:
        settings, original = dual_encoder_form.PLAIN, params
        note = "trained on after its export, so it keeps the poolers and projections of the export"
        report = dataclasses.replace(report, note=note)
    module = _build(hf_config, settings, dtype, logit_bias=hf_config.get("logit_bias"))
    if module.logit_bias_init is not None:
        original["logit_bias"] = np.asarray(module.logit_bias_init, np.float32)
    return module, original, hf_config, report


def _build(
    hf_config: Mapping[str, Any],
    settings: dual_encoder_form.Settings,
    dtype: Literal["float32", "bfloat16"],
    logit_bias: float | None = None,
) -> DualEncoder:
    config = ModelConfig(
        image=TowerConfig(pooling=settings.image_pooling, projection=settings.image_projection),
        text=TowerConfig(pooling=settings.text_pooling, projection=settings.text_projection),
        projection_dim=hf_config["projection_dim"],
        dtype=dtype,
        logit_scale_init=hf_config["logit_scale_init_value"],
        logit_bias_init=logit_bias,
    )
    return build_dual_encoder(hf_config["vision_config"], hf_config["text_config"], config)


def _recognise_dual_encoder(
    tensors: files.Tensors, module: DualEncoder
) -> tuple[names.Recognised, list[str]]:
    """As `names.recognise`, for each tower on its own; and the stacks of both."""
    towers = {"vision_model": module.vision_model, "text_model": module.text_model}
    result = names.Recognised({}, [])
    stacks = []
    outside = set(tensors.values)
    for part, tower in towers.items():
        inside = {name for name in tensors.values if name.startswith(f"{part}.")}
        outside -= inside
        family = names.FAMILIES[model_type(tower)]
        known, ignored = names.recognise(
            (name.removeprefix(f"{part}.") for name in inside), family, has_pooler=True
        )
        result.names.update({f"{part}.{usual}": f"{part}.{name}" for usual, name in known.items()})
        result.ignored.extend(f"{part}.{name}" for name in ignored)
        stacks.append(f"{part}/{family.stack}")
    result.names.update({name: name for name in outside})
    return result, stacks


def _expected(module: nn.Module, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every parameter; nothing is computed."""
    variables: Any = jax.eval_shape(module.init, jax.random.key(0), example)
    flat: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    return flat


def _fill(
    expected: Mapping[str, jax.ShapeDtypeStruct],
    tensors: files.Tensors,
    name_in_file: Mapping[str, str],
    stacks: list[str],
) -> Params:
    """The expected parameters from the tensors, each used exactly once, else a UserError that lists
    what differs.
    """
    params: dict[str, np.ndarray] = {}
    unused = dict(name_in_file)
    missing: list[str] = []
    unfit: list[str] = []
    for path, leaf in expected.items():
        parts, shape = names.parts(path, leaf.shape, stacks)
        value = np.empty((len(parts), *shape), np.float32)
        for i, part in enumerate(parts):
            usual = names.spelled(part, tensors.layout)
            if usual not in unused:
                missing.append(usual)
                continue
            array = tensors.values[unused.pop(usual)]
            view = names.from_file(part, array, tensors.layout)
            if view.shape == shape and array.dtype in _FLOATS:
                value[i] = view
            else:
                wanted = names.to_file(part, np.broadcast_to(0, shape), tensors.layout).shape
                unfit.append(f"{usual} is {array.dtype}{[*array.shape]}, not float{[*wanted]}")
        params[path] = value.reshape(leaf.shape)
    _check_differences(tensors.file, missing, list(unused.values()), unfit)
    return traverse_util.unflatten_dict(params, sep="/")


def _check_differences(
    file: pathlib.Path, missing: list[str], unexpected: list[str], unfit: list[str]
) -> None:
    found = {"it lacks": missing, "it has, beyond that,": unexpected, "of another kind": unfit}
    texts = [f"{what} {_listed(listed)}" for what, listed in found.items() if listed]
    if texts:
        raise UserError(
            f"The weights of {file} are not those of the model that config.json describes "
            f"({'; '.join(texts)}); take both from one model, without overrides that change a shape."
        )


def _report(tensors: files.Tensors, recognised: names.Recognised) -> LoadReport:
    used = [tensors.values[name] for name in recognised.names.values()]
    dtypes = tuple(sorted({array.dtype.name for array in used}))
    ignored = tuple(sorted(recognised.ignored))
    return LoadReport(tensors.file, tensors.layout, len(used), dtypes, ignored)


def _listed(names_: Iterable[str]) -> str:
    """At most a few names; the layers of a stack count as one."""
    groups = collections.Counter(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(names_))
    shown = [f"{name} ({n} times)" if n > 1 else name for name, n in groups.items()][:_LISTED]
    more = len(groups) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
