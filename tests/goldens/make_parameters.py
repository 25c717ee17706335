"""The maker of parameters/: parameters.txt of each variant of configs/vit_bert.py on a mesh of 4 x 2.

Path, shape, dtype, partition and learning of every parameter, without reading any weights.
"""

import dataclasses
from pathlib import Path

import jax
from transformers import BertConfig, ViTConfig

from lit_jax.config import MeshConfig, parse
from lit_jax.configs.vit_bert import DEMO, get_config
from lit_jax.distributed.mesh import make_mesh
from lit_jax.training.model_factory import build_model
from lit_jax.training.tower_paths import TowerPaths

GOLDEN = Path(__file__).with_name("parameters")
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# The Hub's google/vit-*-patch16-224-in21k and google-bert/bert-*-uncased: transformers' defaults are B/16
# and base.
SIZES = {"base": {}, "large": LARGE}
VARIANTS = ("demo", *SIZES)


def make_table(variant: str) -> str:
    """The table of one variant; needs eight devices."""
    config = parse(get_config(variant))
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    if variant == "demo":
        paths = None
    else:
        # The demo's processors do: neither shapes a parameter, but for the size of the images.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=224))
        hf_config = {
            "vision_config": ViTConfig(**SIZES[variant]).to_dict(),
            "text_config": BertConfig(**SIZES[variant]).to_dict(),
        }
        paths = TowerPaths(
            image_folder=DEMO / "vit", text_folder=DEMO / "bert", hf_config=hf_config
        )
    model = build_model(config, mesh, paths)
    return model.policy.table(model.abstract)


def main() -> None:
    """Write the tables of all variants."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.mkdir(exist_ok=True)
    for name in VARIANTS:
        (GOLDEN / f"{name}.txt").write_text(make_table(name))
