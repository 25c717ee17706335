"""From a config to a model on the mesh: towers, policy, shardings, first parameters."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lit_jax.config import TEACHER, Config, DataConfig, ModelConfig, TowerConfig
from lit_jax.data.image import ImageTransform
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.readers import Captions, ImageTextReader, Inputs, Pixels, Reader, TextPairReader
from lit_jax.data.text import tokenize
from lit_jax.distributed.sharding import parameter_shardings
from lit_jax.errors import UserError
from lit_jax.models.distillation import TextDistillation
from lit_jax.models.dual_encoder import (
    SYSTEMS,
    TOWERS,
    DualEncoderModule,
    Side,
    build_dual_encoder,
    tower_name,
)
from lit_jax.training.policy import Policy, find_cuts, is_pretrained, resolve_policy
from lit_jax.training.step import named_key
from lit_jax.training.teacher import (
    Teacher,
    TeacherFolder,
    altclip_config,
    find_teacher,
    load_teacher,
    pretrained_parameters,
)
from lit_jax.training.tokenizing import open_tokenizer
from lit_jax.trees import Tree, flatten, restack, unflatten
from lit_jax.weights.hub import OWN_TYPE, local_folder, override, read_config, read_tower_config
from lit_jax.weights.load import (
    dual_encoder_module,
    load_dual_encoder,
    load_tower,
    parameter_shapes,
)
from lit_jax.weights.vision_text_dual_encoder import why_not_exportable

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Where the two towers come from, and the config they make as one dual encoder."""

    image_folder: Path
    text_folder: Path
    hf_config: dict[str, Any]
    is_whole: bool = False  # both folders are that of one dual encoder, with projections of its own
    teacher: TeacherFolder | None = None  # then the image folder is that of its CLIP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A model without its parameters. `abstract` has their shapes, dtypes and shardings."""

    hf_config: dict[str, Any]
    module: DualEncoderModule
    image_transform: ImageTransform
    tokenizer: Any
    policy: Policy
    abstract: Tree
    mesh: Mesh
    teacher: Teacher | None

    @property
    def embed(self) -> Callable[..., Any]:
        """What the train step calls."""
        if self.teacher is None:
            return self.module.apply
        return TextDistillation(self.module.text_model, self.teacher.module).apply

    def inputs(self, config: DataConfig) -> dict[Side, Pixels | Captions]:
        """What makes the inputs of each tower."""
        return {
            "image": Pixels(self.image_transform, config.views),
            "text": Captions(self.tokenizer),
        }

    def reader(
        self, config: DataConfig, pooled: Mapping[Side, Inputs] = MappingProxyType({})
    ) -> Reader:
        """What makes the batches that `embed` needs; `pooled` takes the place of a tower's inputs."""
        if self.teacher is not None:
            return TextPairReader(self.tokenizer, self.teacher.tokenizer)
        inputs = {**self.inputs(config), **pooled}
        return ImageTextReader(inputs["image"], inputs["text"])

    def pooled_shape(self, side: Side) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what the tower pools of one example."""
        inputs = self.module.example_batch
        names = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}[side]
        pool = functools.partial(self.module.apply, method=f"pool_{side}")
        return jax.eval_shape(
            lambda params, *args: pool({"params": params}, *args),
            self.abstract,
            *(inputs[name] for name in names),
        )

    @property
    def abstract_trainable(self) -> Tree:
        return self.policy.split(self.abstract)[0]

    @property
    def abstract_frozen(self) -> Tree:
        return self.policy.split(self.abstract)[1]


def find_towers(config: ModelConfig) -> Towers:
    """Resolves both towers' folders (from the Hub if need be) and reads their configs."""
    if config.teacher:
        return _find_student(config)
    if config.dual_encoder:
        return _find_dual_encoder(config)
    image = local_folder(config.image.model, config_key="config.model.image.model")
    text = local_folder(config.text.model, config_key="config.model.text.model")
    hf_config = {
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": _override(read_tower_config(image, "image"), config.image, "image"),
        "text_config": _override(read_tower_config(text, "text"), config.text, "text"),
    }
    return Towers(image_folder=image, text_folder=text, hf_config=hf_config)


def _check_joint(config: ModelConfig, key: str) -> None:
    """Raises UserError for what would do nothing beside `key`, which names a model that is joined already."""
    names = ("projection_dim", "logit_scale_init", "logit_bias_init")
    set_too = [
        f"config.model.{name}"
        for name in names
        if getattr(config, name) != getattr(ModelConfig(), name)
    ]
    if set_too:
        raise UserError(
            f"config.model.{key} brings what joins the two towers; leave {' and '.join(set_too)} as by "
            "default."
        )


def _find_student(config: ModelConfig) -> Towers:
    """As `find_towers`, of a CLIP with another text tower."""
    if config.dual_encoder or config.image != TowerConfig():
        raise UserError(
            "config.model.teacher names the CLIP whose image tower is kept; leave config.model.dual_encoder "
            "and config.model.image as they are by default."
        )
    _check_joint(config, "teacher")
    teacher, clip = find_teacher(config.teacher)
    text = local_folder(config.text.model, config_key="config.model.text.model")
    student = _override(read_tower_config(text, "text"), config.text, "text")
    return Towers(
        image_folder=teacher.folder,
        text_folder=text,
        hf_config=altclip_config(clip, student),
        teacher=teacher,
    )


def _find_dual_encoder(config: ModelConfig) -> Towers:
    """As `find_towers`, of a folder that has both."""
    _check_joint(config, "dual_encoder")
    folder = local_folder(config.dual_encoder, config_key="config.model.dual_encoder")
    hf_config = read_config(folder)
    if hf_config["model_type"] not in SYSTEMS:
        raise UserError(
            f"config.model.dual_encoder is {config.dual_encoder!r}, a model of type "
            f"{hf_config['model_type']}; it must be one of {', '.join(SYSTEMS)}."
        )
    sides: tuple[tuple[Side, TowerConfig], ...] = (("image", config.image), ("text", config.text))
    for side, tower in sides:
        if dataclasses.replace(tower, overrides={}) != TowerConfig():
            raise UserError(
                f"config.model.dual_encoder names both towers and what joins them; of config.model.{side} "
                "only overrides can be set beside it."
            )
        part = f"{TOWERS[side]}_config"
        hf_config[part] = _override(hf_config[part], tower, side)
    return Towers(image_folder=folder, text_folder=folder, hf_config=hf_config, is_whole=True)


def _override(hf: dict[str, Any], tower: TowerConfig, side: Side) -> dict[str, Any]:
    return override(hf, tower.overrides, f"config.model.{side}.overrides.")


def prepare(config: Config, towers: Towers, mesh: Mesh) -> Setup:
    """Builds module, processors, policy and shardings; computes and reads no parameter."""
    if config.model.dual_encoder or config.model.teacher:
        module = dual_encoder_module(towers.hf_config, dtype=config.model.dtype)
    else:
        module = build_dual_encoder(
            towers.hf_config["vision_config"], towers.hf_config["text_config"], config.model
        )
    image_transform = load_image_transform(
        towers.image_folder,
        image_size=config.data.image_size,
        crop_min_area=config.data.crop_min_area,
        random_crop=config.data.random_crop,
        flip=config.data.flip,
        color_jitter=config.data.color_jitter,
        rand_augment=config.data.rand_augment,
        reduced_jpeg=config.data.reduced_jpeg,
    )
    module = module.with_remat(config.remat).pooled_only()
    module = module.clone(normalization=image_transform.normalization)
    if (config.data.views or 1) > 1 and not image_transform.is_random:
        raise UserError(
            f"config.data.views={config.data.views}, but without an augmentation all views of an image are "
            "the same; leave it out, or set config.data.crop_min_area, flip or another augmentation."
        )
    tokenizer = open_tokenizer(
        towers.text_folder,
        module.text_model,
        config.data,
        pretrained=is_pretrained(config.policy.lock)[1],
    )
    example = example_batch(image_transform, tokenizer)
    # What trains and what is locked cannot be in one array, so the rules say where stacks are cut.
    cuts = find_cuts(
        config.policy, parameter_shapes(module, example), has_teacher=towers.teacher is not None
    )
    module = module.with_cuts(cuts)
    shapes = parameter_shapes(module, example)
    length = tokenizer.model_max_length
    teacher = load_teacher(towers.teacher, config, length) if towers.teacher else None
    if teacher:
        shapes[TEACHER] = parameter_shapes(teacher.module, teacher.module.example_input)
    policy = resolve_policy(config.policy, shapes, has_teacher=teacher is not None)
    return Setup(
        hf_config=towers.hf_config,
        module=module,
        image_transform=image_transform,
        tokenizer=tokenizer,
        policy=policy,
        abstract=_abstract(shapes, policy, config, mesh),
        mesh=mesh,
        teacher=teacher,
    )


def warn_of_export(setup: Setup) -> None:
    """Warn before the training of what the export would say after it."""
    is_joined = setup.hf_config["model_type"] in ("vision-text-dual-encoder", OWN_TYPE)
    if is_joined and (reason := why_not_exportable(setup.module)):
        log.warning(
            "The export will be readable by lit_jax only, because VisionTextDualEncoder of transformers "
            "cannot be this model: %s.",
            reason,
        )


def example_batch(image_transform: ImageTransform, tokenizer: Any) -> dict[str, jax.Array]:
    """The smallest batch: enough to shape the parameters."""
    pixels = np.zeros((1, *image_transform.output_shape), np.uint8)
    batch = {"pixel_values": pixels, **tokenize(tokenizer, ["a"])}
    return {name: jnp.asarray(array) for name, array in batch.items()}


def _abstract(shapes: Tree, policy: Policy, config: Config, mesh: Mesh) -> Tree:
    shardings = flatten(parameter_shardings(shapes, mesh))
    towers = {*map(tower_name, TOWERS), TEACHER}

    def dtype(path: str) -> Any:
        # Trainable parameters are float32 masters; locked ones are stored in the dtype they are used in, and
        # outside the towers that is float32.
        in_tower = path.partition("/")[0] in towers
        return config.model.dtype if in_tower and not policy.trainable[path] else jnp.float32

    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path), sharding=shardings[path])
            for path, leaf in flatten(shapes).items()
        }
    )


def first_parameters(config: Config, setup: Setup, towers: Towers) -> tuple[Tree, Tree]:
    """Step 0: (trainable, frozen) on the mesh in float32: pretrained towers read, the rest drawn."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    params = restack(_pretrained_parameters(config, setup, towers), setup.abstract)
    flat_shardings, read = flatten(shardings), flatten(params)
    read = {path: _place(array, flat_shardings[path]) for path, array in read.items()}
    batch = example_batch(setup.image_transform, setup.tokenizer)

    def init() -> dict[str, jax.Array]:
        drawn = setup.module.init(named_key(config.seed, "init", 0), batch)["params"]
        return {path: leaf for path, leaf in flatten(drawn).items() if path not in read}

    rest = {path: sharding for path, sharding in flat_shardings.items() if path not in read}
    drawn = jax.jit(init, out_shardings=rest)()
    return setup.policy.split(unflatten(read | drawn))


def _pretrained_parameters(config: Config, setup: Setup, towers: Towers) -> dict[str, Any]:
    """What of the tree is read: the towers that the lock calls pretrained. A dual encoder brings what joins
    them, too, but that fits only the two it was trained with.
    """
    image, text = is_pretrained(config.policy.lock)
    if towers.teacher:
        student = towers.text_folder if text else None
        return pretrained_parameters(
            towers.image_folder, student, towers.hf_config["text_config"], config.model.dtype
        )
    if towers.is_whole and image and text:
        module, params, _, report = load_dual_encoder(
            towers.image_folder, dtype=config.model.dtype, hf_config=towers.hf_config
        )
        log.info("%s", report)
        as_trained = module.with_remat(config.remat).pooled_only()
        if as_trained.towers != setup.module.with_cuts({}).towers:
            raise UserError(
                f"config.model.dual_encoder: {towers.image_folder} was exported by lit_jax and then trained "
                "on with transformers; save it with transformers once more without the key 'lit_jax' in its "
                "config.json."
            )
        return params
    params = {}
    for name, folder, pretrained in (
        ("vision_model", towers.image_folder, image),
        ("text_model", towers.text_folder, text),
    ):
        if pretrained:
            params[name], report = load_tower(folder, getattr(setup.module, name))
            log.info("%s", report)
    return params


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
