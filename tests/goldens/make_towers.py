"""The maker of towers/: tiny random models as Hugging Face saves them, and the outputs of PyTorch.

towers/versions.json records the versions that made them. The `oracle` tests use the functions here, too, for
models that they draw at random.
"""

from __future__ import annotations  # transformers 4 has no PreTrainedConfig

import copy
import inspect
import json
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import transformers
from transformers.activations import ACT2FN

from tests.goldens.models import BERT, TOWERS, VIT, random_images, random_texts, vision_text

GOLDENS = pathlib.Path(__file__).with_name("towers")
SPECIAL_TOKENS = {"deit": 2, "siglip_vision_model": 0}  # in front of the patches, where not one


class Reference(NamedTuple):
    """What PyTorch computes.

    `gradients` is a model of the same shape whose "weights" are the gradients of the sum of every output
    times its cotangent. `arrays` has inputs, outputs, cotangents, and the gradient of the pixels of a tower.
    Images are BxHxWxC, and a last_hidden_state that is a map of features is a sequence. `after` is the
    model with the running statistics that this left behind.
    """

    model: transformers.PreTrainedModel
    gradients: transformers.PreTrainedModel
    arrays: dict[str, np.ndarray]
    after: transformers.PreTrainedModel


def compute_tower(
    config: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    pooling: str,
    seed: int,
    train: bool = False,
) -> Reference:
    """A tower with random weights, in train mode if `train`."""
    config._attn_implementation = "eager"
    optional = inspect.signature(_class_of(config).__init__).parameters.keys()
    optional &= {"add_pooling_layer"}
    model = _random_model(config, seed, **dict.fromkeys(optional, pooling == "pooler")).train(train)
    before = copy.deepcopy(model)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    extra = {}
    if "pixel_values" in tensors:
        tensors["pixel_values"].requires_grad_()
        shape = inputs["pixel_values"].shape[1:3]
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            extra = {"interpolate_pos_encoding": shape != _pair(config.image_size)}
    special_tokens = SPECIAL_TOKENS.get(config.model_type, 1)
    special_tokens += getattr(config, "num_register_tokens", 0)
    outputs = _run_tower(model, tensors, extra, pooling, special_tokens)
    gradients, arrays = _differentiate(model, outputs)
    arrays |= {"pooling": np.array(pooling)}
    arrays |= {f"input.{name}": value for name, value in inputs.items()}
    if "pixel_values" in tensors:
        arrays["gradient.pixel_values"] = tensors["pixel_values"].grad.numpy()
    return Reference(before, gradients, arrays, after=model)


def compute_dual_encoder(
    config: transformers.PreTrainedConfig, inputs: Mapping[str, np.ndarray], *, seed: int
) -> Reference:
    """A dual encoder with random weights."""
    model = _random_model(config, seed).eval()
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    result = model(**tensors)
    names = ("image_embeds", "text_embeds", "logits_per_image")
    gradients, arrays = _differentiate(model, {name: result[name] for name in names})
    arrays |= {f"input.{name}": value for name, value in inputs.items()}
    return Reference(model, gradients, arrays, after=model)


def write_tower(folder: pathlib.Path, *args, **kwargs) -> None:
    """Writes the `compute_tower` of the arguments into `folder`, and beside it gradients/, arrays.npz and,
    of a model in train mode, after/.
    """
    reference = compute_tower(*args, **kwargs)
    reference.model.save_pretrained(folder)
    reference.gradients.save_pretrained(folder / "gradients")
    if reference.after.training:
        reference.after.save_pretrained(folder / "after")
    np.savez(folder / "arrays.npz", **reference.arrays)


def write_dual_encoder(
    folder: pathlib.Path,
    vision: transformers.PreTrainedConfig,
    text: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    seed: int,
) -> None:
    """Writes a VisionTextDualEncoder with random weights and arrays.npz with inputs and outputs."""
    reference = compute_dual_encoder(vision_text(vision, text), inputs, seed=seed)
    reference.model.save_pretrained(folder)
    np.savez(folder / "arrays.npz", **reference.arrays)


def _class_of(config: transformers.PreTrainedConfig) -> type:
    # By name: AutoModel does not know the towers of some dual encoders.
    return getattr(transformers, type(config).__name__.replace("Config", "Model"))


def _random_model(
    config: transformers.PreTrainedConfig, seed: int, **options
) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = _class_of(config)(config, **options)
    _draw_parameters(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it stops a gradient, and changes no output
    return model


def _differentiate(
    model: transformers.PreTrainedModel, outputs: Mapping[str, torch.Tensor]
) -> tuple[transformers.PreTrainedModel, dict[str, np.ndarray]]:
    """`Reference.gradients`, and the outputs and cotangents of `Reference.arrays`."""
    cotangents = {name: torch.randn_like(value) for name, value in outputs.items()}
    sum((outputs[name] * cotangents[name]).sum() for name in outputs).backward()
    gradients = copy.deepcopy(model)
    for statistic in _running_statistics(gradients).values():
        statistic.zero_()
    for parameter, own in zip(gradients.parameters(), model.parameters(), strict=True):
        # Of a parameter that no output depends on.
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    arrays = {f"output.{name}": value.detach().numpy() for name, value in outputs.items()}
    arrays |= {f"cotangent.{name}": value.numpy() for name, value in cotangents.items()}
    return gradients, arrays


def _pair(size: int | list[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _draw_parameters(model: torch.nn.Module) -> None:
    """Random numbers of a size at which no activation is nearly linear and no bias is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "temperature"):
                parameter.normal_(0, 0.25)
            is_norm = "norm" in name.lower() or "_bn." in name
            if is_norm and name.endswith("weight"):
                parameter += 1
        for name, statistic in _running_statistics(model).items():
            if name.endswith("mean"):
                statistic.normal_(0, 0.25)
            else:
                statistic.uniform_(0.5, 2)


def _running_statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of batch normalisation."""
    return {name: value for name, value in model.named_buffers() if ".running_" in name}


def _run_tower(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    extra: Mapping,
    pooling: str,
    special_tokens: int,
) -> dict[str, torch.Tensor]:
    given = dict(tensors)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].permute(0, 3, 1, 2)
    result = model(**given, **extra)
    hidden = result.last_hidden_state
    if hidden.ndim == 4:  # BxDxYxX
        hidden, special_tokens = hidden.flatten(2).mT, 0
    if pooling == "pooler":
        pooled = result.pooler_output
    elif pooling == "cls":
        pooled = hidden[:, 0]
    elif "pixel_values" in given:
        pooled = hidden[:, special_tokens:].mean(1)
    else:
        weight = given["attention_mask"][..., None].float()
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    return {"last_hidden_state": hidden, "pooled": pooled}


INTERPOLATIONS = {
    "bicubic": {"mode": "bicubic"},
    "bilinear": {"mode": "bilinear"},
    "antialiased_bicubic": {"mode": "bicubic", "antialias": True},
}


def main(wanted: Sequence[str]) -> None:
    for name, (config, inputs, pooling) in TOWERS.items():
        if not wanted or name in wanted:
            seed = zlib.crc32(name.encode())  # stays as it is when others come and go
            shutil.rmtree(GOLDENS / name, ignore_errors=True)
            train = name.endswith("_training")
            write_tower(GOLDENS / name, config, inputs, pooling=pooling, seed=seed, train=train)
    if not wanted or "dual_encoder" in wanted:
        inputs = random_images(6, 2, 12, 12, 3) | random_texts(
            7, BERT, length=7, optional=("token_type_ids",)
        )
        write_dual_encoder(GOLDENS / "dual_encoder", VIT, BERT, inputs, seed=0)
    write_functions()
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    (GOLDENS / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def write_functions() -> None:
    """Writes the values of activations, and of a grid that is interpolated to other sizes."""
    x = torch.linspace(-8, 8, 65)
    names = [name for name in ACT2FN if name not in ("prelu", "xielu")]  # those have parameters
    np.savez(GOLDENS / "activations.npz", x=x, **{name: ACT2FN[name](x).numpy() for name in names})
    grid = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    for name, options in INTERPOLATIONS.items():
        resized = {
            f"{size[0]}x{size[1]}": torch.nn.functional.interpolate(grid, size, **options)[0, 0]
            for size in ((5, 7), (8, 7), (3, 16), (1, 2))
        }
        np.savez(GOLDENS / f"{name}.npz", grid=grid[0, 0], **resized)
