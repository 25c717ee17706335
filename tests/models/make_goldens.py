"""Writes goldens/: tiny random models as Hugging Face saves them, and what PyTorch computes with them.

    python tests/models/make_goldens.py [name ...]     (with the packages of requirements-oracle.txt)

Without names all are written.
goldens/versions.json records what they were made with. The `oracle` tests use the functions here too,
for models that they draw at random.
"""

import copy
import inspect
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import transformers
from transformers.activations import ACT2FN

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SPECIAL_TOKENS = {"deit": 2}  # in front of the patches, where there is not one


def write_tower(
    folder: pathlib.Path,
    config: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    pooling: str,
    seed: int,
) -> None:
    """Writes a tower with random weights into `folder`, and beside it

    gradients/: a model of the same shape whose "weights" are the gradients of
        (last_hidden_state * its cotangent).sum() + (pooled * its cotangent).sum();
    arrays.npz: inputs, outputs, cotangents, the gradient of the pixels. Images are BxHxWxC.
    """
    torch.manual_seed(seed)
    kind = transformers.MODEL_MAPPING[type(config)]
    optional = inspect.signature(kind.__init__).parameters.keys() & {"add_pooling_layer"}
    config._attn_implementation = "eager"
    model = kind(config, **dict.fromkeys(optional, pooling == "pooler")).eval()
    _draw_parameters(model)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    extra = {}
    if "pixel_values" in tensors:
        tensors["pixel_values"].requires_grad_()
        shape = inputs["pixel_values"].shape[1:3]
        extra = {"interpolate_pos_encoding": shape != _pair(config.image_size)}
    outputs = _run_tower(model, tensors, extra, pooling, SPECIAL_TOKENS.get(config.model_type, 1))
    cotangents = {name: torch.randn_like(value) for name, value in outputs.items()}
    sum((outputs[name] * cotangents[name]).sum() for name in outputs).backward()

    model.save_pretrained(folder)
    gradients = copy.deepcopy(model)
    for parameter, own in zip(gradients.parameters(), model.parameters(), strict=True):
        # Of a parameter that no output depends on.
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    gradients.save_pretrained(folder / "gradients")
    arrays = {"pooling": np.array(pooling)}
    arrays |= {f"input.{name}": value for name, value in inputs.items()}
    arrays |= {f"output.{name}": value.detach().numpy() for name, value in outputs.items()}
    arrays |= {f"cotangent.{name}": value.numpy() for name, value in cotangents.items()}
    if "pixel_values" in tensors:
        arrays["gradient.pixel_values"] = tensors["pixel_values"].grad.numpy()
    np.savez(folder / "arrays.npz", **arrays)


def write_dual_encoder(
    folder: pathlib.Path,
    vision: transformers.PreTrainedConfig,
    text: transformers.PreTrainedConfig,
    inputs: Mapping[str, np.ndarray],
    *,
    seed: int,
) -> None:
    """Writes a VisionTextDualEncoder with random weights and arrays.npz with inputs and outputs."""
    torch.manual_seed(seed)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=8, logit_scale_init_value=1.5
    )
    model = transformers.VisionTextDualEncoderModel(config).eval()
    _draw_parameters(model)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    with torch.no_grad():
        result = model(**tensors)
    model.save_pretrained(folder)
    arrays = {f"input.{name}": value for name, value in inputs.items()}
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        arrays[f"output.{name}"] = result[name].numpy()
    np.savez(folder / "arrays.npz", **arrays)


def _pair(size: int | list[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _draw_parameters(model: torch.nn.Module) -> None:
    """Random numbers of a size at which no activation is nearly linear and no bias is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(0, 0.25)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1


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


def random_images(seed: int, *shape: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return {"pixel_values": values}


def random_texts(
    seed: int, config: transformers.BertConfig, *, length: int, optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Two texts, of full and of half length; `optional` names token_type_ids and position_ids."""
    random = np.random.default_rng(seed)
    shape = (2, length)
    mask = np.arange(length) < np.array([[length], [(length + 1) // 2]])
    positions = np.tile(np.arange(config.max_position_embeddings), (2, 1))
    inputs = {
        "input_ids": random.integers(1, config.vocab_size, shape) * mask,
        "attention_mask": mask,
        "token_type_ids": random.integers(0, config.type_vocab_size, shape),
        "position_ids": random.permuted(positions, axis=1)[:, :length],
    }
    wanted = ("input_ids", "attention_mask", *optional)
    return {name: inputs[name].astype(np.int32) for name in wanted}


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
VIT = transformers.ViTConfig(**SMALL, image_size=12, patch_size=4)
DEIT = transformers.DeiTConfig(**SMALL, image_size=12, patch_size=4)
UNUSUAL_VIT = transformers.ViTConfig(
    **SMALL,
    image_size=[6, 12],
    patch_size=[2, 3],
    num_channels=1,
    hidden_act="quick_gelu",
    layer_norm_eps=0.1,
    qkv_bias=False,
    pooler_output_size=10,
    pooler_act="sigmoid",
)
# A pad_token_id would stop a gradient in torch; it changes no number of the forward pass.
SMALL_BERT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 10, "pad_token_id": None}
BERT = transformers.BertConfig(**SMALL_BERT)
UNUSUAL_BERT = transformers.BertConfig(
    **SMALL_BERT,
    hidden_act="gelu_new",
    layer_norm_eps=0.1,
    type_vocab_size=3,
    is_decoder=True,
    use_cache=False,
)
TYPES, POSITIONS = "token_type_ids", "position_ids"
TOWERS = {
    "vit": (VIT, random_images(0, 2, 12, 12, 3), "pooler"),
    "vit_unusual": (UNUSUAL_VIT, random_images(1, 2, 6, 12, 1), "pooler"),
    "vit_interpolated": (VIT, random_images(2, 2, 17, 8, 3), "mean"),
    "bert": (BERT, random_texts(3, BERT, length=7, optional=(TYPES,)), "pooler"),
    "bert_unusual": (
        UNUSUAL_BERT,
        random_texts(4, UNUSUAL_BERT, length=7, optional=(TYPES, POSITIONS)),
        "pooler",
    ),
    "bert_mean": (BERT, random_texts(5, BERT, length=7), "mean"),
    "deit": (DEIT, random_images(8, 2, 12, 12, 3), "pooler"),
    "deit_interpolated": (DEIT, random_images(9, 2, 17, 8, 3), "mean"),
}


def main(wanted: Sequence[str]) -> None:
    for seed, (name, (config, inputs, pooling)) in enumerate(TOWERS.items()):
        if not wanted or name in wanted:
            shutil.rmtree(GOLDENS / name, ignore_errors=True)
            write_tower(GOLDENS / name, config, inputs, pooling=pooling, seed=seed)
    if not wanted or "dual_encoder" in wanted:
        inputs = random_images(6, 2, 12, 12, 3) | random_texts(7, BERT, length=7, optional=(TYPES,))
        write_dual_encoder(GOLDENS / "dual_encoder", VIT, BERT, inputs, seed=0)
    write_functions()
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    (GOLDENS / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def write_functions() -> None:
    """Writes the values of activations, and of bicubic interpolation of a grid to other sizes."""
    x = torch.linspace(-8, 8, 65)
    names = [name for name in ACT2FN if name not in ("prelu", "xielu")]  # those have parameters
    np.savez(GOLDENS / "activations.npz", x=x, **{name: ACT2FN[name](x).numpy() for name in names})
    grid = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    resized = {
        f"{size[0]}x{size[1]}": torch.nn.functional.interpolate(grid, size, mode="bicubic")[0, 0]
        for size in ((5, 7), (8, 7), (3, 16), (1, 2))
    }
    np.savez(GOLDENS / "bicubic.npz", grid=grid[0, 0], **resized)


if __name__ == "__main__":
    main(sys.argv[1:])
