"""The maker of files/: tiny models as transformers 4 saves them, and their outputs.

It needs the last transformers with Flax classes, in an environment of its own:

    pip install transformers==4.57.6 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 torch==2.13.0

All folders named after one model (vit, bert, dual) have the same weights in another file format.
outputs.npz holds what PyTorch computes with them. tensors.bin and legacy.bin are plain torch.save files.
names.json has the names in the files of every family, see `save_names`.
"""

import collections
import json
import pathlib
import re
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers as tr
from flax import traverse_util

from tests.goldens.models import DUAL_ENCODERS, FAMILIES

HERE = pathlib.Path(__file__).with_name("files")
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "initializer_range": 0.3,  # so that an error in any tensor shows
}


def main() -> None:
    torch.manual_seed(0)
    vit = tr.ViTModel(tr.ViTConfig(image_size=8, patch_size=4, **SIZES)).eval()
    bert = tr.BertModel(tr.BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES)).eval()
    config = tr.VisionTextDualEncoderConfig.from_vision_text_configs(
        vit.config, bert.config, projection_dim=6
    )
    dual = tr.VisionTextDualEncoderModel(config, vit, bert).eval()
    # Biases and scales are 0 and 1 at the start; no parameter may be like another one.
    for parameter in dual.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_vit(vit)
    save_bert(bert)
    save_dual(dual)
    save_outputs(vit, bert, dual)
    save_tensors()
    save_clip()
    save_names()


def save_vit(vit: tr.ViTModel) -> None:
    vit.save_pretrained(HERE / "vit_torch")
    vit.save_pretrained(HERE / "vit_torch_sharded", max_shard_size="3KB")
    vit.save_pretrained(HERE / "vit_bin", safe_serialization=False)
    vit.save_pretrained(HERE / "vit_bin_sharded", safe_serialization=False, max_shard_size="3KB")
    flax = tr.FlaxViTModel.from_pretrained(HERE / "vit_torch", from_pt=True)
    flax.save_pretrained(HERE / "vit_flax_sharded", max_shard_size="3KB")
    flax.save_pretrained(HERE / "vit_flax_safetensors", safe_serialization=True)


def save_bert(bert: tr.BertModel) -> None:
    bert.save_pretrained(HERE / "bert_torch")
    head = tr.BertForPreTraining(bert.config)
    head.bert = bert
    head.save_pretrained(HERE / "bert_head_torch")
    tr.FlaxBertForPreTraining.from_pretrained(
        HERE / "bert_head_torch", from_pt=True
    ).save_pretrained(HERE / "bert_head_flax")


def save_dual(dual: tr.VisionTextDualEncoderModel) -> None:
    dual.save_pretrained(HERE / "dual_torch")
    tr.FlaxVisionTextDualEncoderModel.from_pretrained(
        HERE / "dual_torch", from_pt=True
    ).save_pretrained(HERE / "dual_flax")


@torch.no_grad()
def save_outputs(vit: tr.ViTModel, bert: tr.BertModel, dual: tr.VisionTextDualEncoderModel) -> None:
    pixels = torch.randn(3, 3, 8, 8)
    batch = {
        "input_ids": torch.randint(1, 20, (3, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
        "token_type_ids": torch.tensor([[0] * 7, [0] * 2 + [1] * 5, [0] * 7]),
    }
    np.savez(
        HERE / "outputs.npz",
        pixel_values=pixels.permute(0, 2, 3, 1).numpy(),
        **{name: array.numpy().astype(np.int32) for name, array in batch.items()},
        vit=vit(pixel_values=pixels).pooler_output.numpy(),
        bert=bert(**batch).pooler_output.numpy(),
        dual=dual(pixel_values=pixels, **batch).logits_per_image.numpy(),
    )


def save_tensors() -> None:
    base = torch.randn(4, 6)
    tensors = {
        "whole": base,
        "tied": base,
        "transposed": base.T,
        "row": base[2],
        "column": base[:, 3],
        "block": base[1:3, 2:5],
        "steps": base[::2, ::3],
        "expanded": base[:, :1].expand(4, 5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "float64": base.double(),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
    }
    torch.save(collections.OrderedDict(tensors), HERE / "tensors.bin")
    torch.save({"w": torch.ones(2)}, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    tensors["bfloat16"] = tensors["bfloat16"].float()  # NumPy has no bfloat16 of its own
    np.savez(HERE / "tensors.npz", **{n: t.detach().numpy() for n, t in tensors.items()})


@torch.no_grad()
def save_clip() -> None:
    """The towers of CLIP and SigLIP, whose names changed with transformers 5."""
    torch.manual_seed(1)
    pixels, ids = torch.randn(2, 3, 8, 8), torch.tensor([[3, 7, 19, 7, 5], [4, 1, 9, 8, 7]])
    sizes = {**SIZES, "num_hidden_layers": 1}
    sizes.pop("initializer_range")  # SigLIP has none
    arrays = {
        "pixel_values": pixels.permute(0, 2, 3, 1).numpy(),
        "input_ids": ids.numpy().astype(np.int32),
    }
    for family in ("CLIP", "Siglip"):
        for side, inputs in (("Vision", {"pixel_values": pixels}), ("Text", {"input_ids": ids})):
            fields = {"image_size": 8, "patch_size": 4}
            if side == "Text":
                fields = {"vocab_size": 20, "max_position_embeddings": 9}
                fields |= {"bos_token_id": 0, "eos_token_id": 7}
            config = getattr(tr, f"{family}{side}Config")(**sizes, **fields)
            model = getattr(tr, f"{family}{side}Model")(config).eval()
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            name = f"{family}_{side}".lower()
            model.save_pretrained(HERE / f"{name}_torch")
            arrays[name] = model(**inputs).pooler_output.numpy()
            if family == "CLIP":
                flax = getattr(tr, f"FlaxCLIP{side}Model")
                flax = flax.from_pretrained(HERE / f"{name}_torch", from_pt=True)
                flax.save_pretrained(HERE / f"{name}_flax")
    np.savez(HERE / "clip_outputs.npz", **arrays)


def save_names() -> None:
    """Write for each family in models.py the names that its class for PyTorch writes, layer numbers as *,
    each with what the last part of it is in the Flax class: null if there is no such class.
    """
    configs = {family: config for family, (config, *_) in FAMILIES.items()} | DUAL_ENCODERS
    names = {family: names_of(config) for family, config in configs.items()}
    (HERE / "names.json").write_text(json.dumps(names, indent=1) + "\n")


def names_of(config: tr.PretrainedConfig) -> dict[str, str | None]:
    class_name = type(config).__name__.replace("Config", "Model")
    with tempfile.TemporaryDirectory() as folder:
        getattr(tr, class_name)(config).save_pretrained(folder)
        torch_names = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    flax_class, flax_names = getattr(tr, f"Flax{class_name}", None), set()
    if flax_class:
        params = traverse_util.flatten_dict(flax_class(config).params, sep=".")
        flax_names = {re.sub(r"\.\d+\.", ".*.", name) for name in params}
    result = {}
    for name in sorted({re.sub(r"\.\d+\.", ".*.", name) for name in torch_names}):
        module, dot, leaf = name.rpartition(".")
        leaves = (leaf, "kernel", "scale", "embedding")
        result[name] = next((new for new in leaves if module + dot + new in flax_names), None)
        flax_names.discard(f"{module}{dot}{result[name]}")
    assert not flax_names, flax_names
    assert not flax_class or None not in result.values(), result
    return result
