"""From a config to a model on the mesh: towers, policy, shardings, first parameters."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lit_jax.config import Config, ModelConfig, TowerConfig, nearest
from lit_jax.data.image import ImageTransform
from lit_jax.data.text import check_vocabulary, load_tokenizer
from lit_jax.distributed.sharding import parameter_shardings
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import DualEncoder, build_dual_encoder
from lit_jax.training.policy import Policy, is_pretrained, resolve_policy
from lit_jax.training.step import named_key
from lit_jax.trees import Tree, flatten, unflatten
from lit_jax.weights.hub import local_folder, read_config
from lit_jax.weights.load import load_tower

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Where the two towers come from, and the config they make as one VisionTextDualEncoder."""

    image_folder: Path
    text_folder: Path
    hf_config: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A model without its parameters. `abstract` has their shapes, dtypes and shardings."""

    hf_config: dict[str, Any]
    module: DualEncoder
    image_transform: ImageTransform
    tokenizer: Any
    policy: Policy
    abstract: Tree
    mesh: Mesh

    @property
    def abstract_trainable(self) -> Tree:
        return self.policy.split(self.abstract)[0]

    @property
    def abstract_frozen(self) -> Tree:
        return self.policy.split(self.abstract)[1]


def find_towers(config: ModelConfig) -> Towers:
    """Resolves both towers' folders (from the Hub if need be) and reads their configs."""
    image = local_folder(config.image.model, config_key="config.model.image.model")
    text = local_folder(config.text.model, config_key="config.model.text.model")
    hf_config = {
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": _tower_config(image, config.image, "config.model.image.overrides"),
        "text_config": _tower_config(text, config.text, "config.model.text.overrides"),
    }
    return Towers(image_folder=image, text_folder=text, hf_config=hf_config)


def _tower_config(folder: Path, tower: TowerConfig, config_key: str) -> dict[str, Any]:
    hf = read_config(folder)
    for key in tower.overrides:
        if key not in hf:
            raise UserError(
                f"{config_key}.{key} is not in {folder}/config.json; {nearest(key, hf)}."
            )
    return hf | tower.overrides


def prepare(config: Config, towers: Towers, mesh: Mesh) -> Setup:
    """Builds module, processors, policy and shardings; computes and reads no parameter."""
    module = build_dual_encoder(
        towers.hf_config["vision_config"], towers.hf_config["text_config"], config.model
    )
    image_transform = ImageTransform.from_folder(
        towers.image_folder,
        image_size=config.data.image_size,
        crop_min_area=config.data.crop_min_area,
        flip=config.data.flip,
    )
    positions = towers.hf_config["text_config"]["max_position_embeddings"]
    if config.data.max_text_length > positions:
        raise UserError(
            f"config.data.max_text_length={config.data.max_text_length} is more than the text tower's "
            f"{positions} positions; lower it."
        )
    tokenizer = load_tokenizer(towers.text_folder, max_length=config.data.max_text_length)
    check_vocabulary(
        tokenizer, towers.hf_config["text_config"]["vocab_size"], "config.model.text.model"
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), example_batch(config, image_transform))
    shapes = shapes["params"]
    policy = resolve_policy(config.policy, shapes)
    return Setup(
        hf_config=towers.hf_config,
        module=module,
        image_transform=image_transform,
        tokenizer=tokenizer,
        policy=policy,
        abstract=_abstract(shapes, policy, config, mesh),
        mesh=mesh,
    )


def example_batch(
    config: Config, image_transform: ImageTransform
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the smallest batch: enough to shape the parameters."""
    tokens = jax.ShapeDtypeStruct((1, config.data.max_text_length), jnp.int32)
    return {
        "pixel_values": jax.ShapeDtypeStruct((1, *image_transform.output_shape), jnp.float32),
        "input_ids": tokens,
        "attention_mask": tokens,
        "token_type_ids": tokens,
    }


def _abstract(shapes: Tree, policy: Policy, config: Config, mesh: Mesh) -> Tree:
    # Trainable parameters are float32 masters; locked ones are stored in the dtype they are used in.
    shardings = flatten(parameter_shardings(shapes, mesh))
    flat = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype if policy.trainable[path] else jnp.dtype(config.model.dtype),
            sharding=shardings[path],
        )
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(flat)


def first_parameters(config: Config, setup: Setup, towers: Towers) -> tuple[Tree, Tree]:
    """Step 0: (trainable, frozen) on the mesh in float32: pretrained towers read, the rest drawn."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    params: dict[str, Any] = {}
    image_pretrained, text_pretrained = is_pretrained(config.policy.lock)
    if image_pretrained:
        params["vision_model"] = _read(towers.image_folder, setup.module.vision_model)
    if text_pretrained:
        params["text_model"] = _read(towers.text_folder, setup.module.text_model)
    params = {name: jax.tree.map(_place, tower, shardings[name]) for name, tower in params.items()}

    def init() -> Tree:
        batch = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), example_batch(config, setup.image_transform)
        )
        drawn = setup.module.init(named_key(config.seed, "init", 0), batch)["params"]
        return {name: tree for name, tree in drawn.items() if name not in params}

    drawn_shardings = {name: tree for name, tree in shardings.items() if name not in params}
    params |= jax.jit(init, out_shardings=drawn_shardings)()
    return setup.policy.split(params)


def _read(folder: Path, tower: Any) -> Tree:
    params, report = load_tower(folder, tower)
    log.info("%s", report)
    return params


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
