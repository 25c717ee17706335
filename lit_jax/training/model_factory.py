"""The model of a config on the mesh: towers, processors, policy, shardings, first parameters."""

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from lit_jax.config import TEACHER, Config, DataConfig, PolicyConfig, Side
from lit_jax.data.image import ImageTransform
from lit_jax.data.image_processor import load_image_transform
from lit_jax.data.loader import Processors
from lit_jax.data.text import check_vocabulary, load_tokenizer, tokenize
from lit_jax.distributed.sharding import parameter_shardings
from lit_jax.errors import UserError
from lit_jax.models.distillation import TextDistillation
from lit_jax.models.dual_encoder import TOWERS, DualEncoderModule, build_dual_encoder, tower_name
from lit_jax.models.tower import Tower
from lit_jax.training.policy import Policy, find_cuts, is_pretrained, merge, resolve_policy
from lit_jax.training.stack_names import uncut_stacks
from lit_jax.training.teacher import load_teacher, pretrained_parameters
from lit_jax.training.tower_paths import TowerPaths, find_towers
from lit_jax.trees import Tree, flatten, restack, unflatten
from lit_jax.weights.load import (
    dual_encoder_module,
    load_dual_encoder,
    load_tower,
    parameter_shapes,
)

log = logging.getLogger(__name__)

# Most captions are shorter, and the cost of a text tower grows with the length.
DEFAULT_TEXT_LENGTH = 32

# The towers that a user passes, by side, each with its pretrained parameters or None.
OwnTowers = Mapping[Side, tuple[Tower, Tree | None]]
_NO_TOWERS: OwnTowers = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A dual encoder as a run trains it, without the values of its parameters.

    Attributes:
        config: the config of the run.
        paths: the folders that the towers come from.
        module: the dual encoder, whose towers compute only their features.
        processors: the preprocessing of images and texts, including the teacher's tokenizer.
        policy: which parameters train, and how fast.
        abstract: shapes, dtypes and shardings of all parameters, a nested dict.
        uncut: the stacks of blocks as they are without cuts; see `stack_names`.
        teacher: the text tower that the student learns from; None in contrastive training.
        own_towers: the towers that a user has passed instead of towers of the config.
    """

    config: Config
    paths: TowerPaths
    module: DualEncoderModule
    processors: Processors
    policy: Policy
    abstract: Tree
    mesh: Mesh
    uncut: frozenset[str] = frozenset()
    teacher: Tower | None = None
    own_towers: OwnTowers = dataclasses.field(default_factory=dict)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of the model's config.json in the format of transformers."""
        return self.paths.hf_config

    @property
    def abstract_trainable(self) -> Tree:
        """The shapes, dtypes and shardings of the trainable parameters."""
        return self.policy.split(self.abstract)[0]

    @property
    def abstract_frozen(self) -> Tree:
        """The shapes, dtypes and shardings of the locked parameters."""
        return self.policy.split(self.abstract)[1]

    def forward(
        self, variables: Mapping[str, Any], batch: Mapping[str, Any], **options: Any
    ) -> Any:
        """Compute the arguments of the loss for a batch; the signature is that of linen's `Module.apply`.

        The result is a `DualEncoderOutput`, or a `DistillationOutput` with a teacher.
        """
        module = self.module
        if self.teacher is not None:
            module = TextDistillation(self.module.text_model, self.teacher)
        return module.apply(variables, batch, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with the parameters of one step of its run.

    Attributes:
        params: the whole tree of the dual encoder, on the mesh.
        step: the number of steps that `params` have trained.
    """

    model: Model
    params: Mapping[str, Any]
    step: int

    @classmethod
    def merged(cls, model: Model, trainable: Tree, frozen: Tree, step: int) -> "TrainedModel":
        """Return a trained model from trainable and locked parameters."""
        params = merge(trainable, frozen)
        # The teacher is only needed for training and is not part of the result.
        params.pop(TEACHER, None)
        return cls(model=model, params=params, step=step)

    @property
    def module(self) -> DualEncoderModule:
        """The module that computes with `params`."""
        return self.model.module


def build_model(
    config: Config,
    mesh: Mesh,
    paths: TowerPaths | None = None,
    own_towers: OwnTowers = _NO_TOWERS,
) -> Model:
    """Build module, processors, policy and shardings, without computing or reading any parameter.

    Args:
        paths: the folders of the towers; None finds those that `config.model` names.
        own_towers: towers that replace those of the folders. The processors still come from the folders.

    Raises UserError if the parts do not fit each other.
    """
    paths = paths or find_towers(config.model)
    module = _module(config, paths, own_towers)
    image_transform = _image_transform(config.data, paths.image_folder)
    # Batches carry images as bytes, a quarter of float32, and the device normalises them.
    module = module.clone(normalization=image_transform.normalization)
    tokenizer = _open_tokenizer(
        paths.text_folder,
        module.text_model,
        config.data,
        pretrained=is_pretrained(config.policy.lock)[1],
    )
    teacher = teacher_tokenizer = None
    if paths.teacher:
        length = tokenizer.model_max_length
        teacher, teacher_tokenizer = load_teacher(paths.teacher, config.model.dtype, length)
    processors = Processors(image_transform, tokenizer, teacher_tokenizer)
    has_teacher = teacher is not None
    module, shapes, uncut = _cut_stacks(
        module, example_batch(processors), config.policy, has_teacher=has_teacher
    )
    if teacher:
        shapes[TEACHER] = parameter_shapes(teacher, teacher.example_input)
    policy = resolve_policy(config.policy, shapes, has_teacher=has_teacher)
    return Model(
        config=config,
        paths=paths,
        module=module,
        processors=processors,
        policy=policy,
        abstract=_abstract(shapes, policy, config, mesh),
        mesh=mesh,
        uncut=uncut,
        teacher=teacher,
        own_towers=own_towers,
    )


def _module(config: Config, paths: TowerPaths, own_towers: OwnTowers) -> DualEncoderModule:
    if config.model.dual_encoder or config.model.teacher:
        module = dual_encoder_module(paths.hf_config, dtype=config.model.dtype)
    else:
        vision, text = paths.hf_config["vision_config"], paths.hf_config["text_config"]
        module = build_dual_encoder(vision, text, config.model)
    own: dict[str, Any] = {
        tower_name(side): tower.clone(dtype=jnp.dtype(config.model.dtype))
        for side, (tower, _) in own_towers.items()
    }
    # Training needs only features, so the last block of a tower may be computed for one token.
    return module.clone(**own).with_remat(config.remat).features_only()


def _cut_stacks(
    module: DualEncoderModule,
    example: Mapping[str, jax.Array],
    policy: PolicyConfig,
    *,
    has_teacher: bool,
) -> tuple[DualEncoderModule, dict[str, Any], frozenset[str]]:
    """Return the module cut as the policy needs, its shapes, and the stacks as they are without cuts."""
    # Trainable and locked parameters cannot share an array, so the rules decide where stacks are cut. They
    # are applied to uncut towers first, and the cuts change the shapes.
    shapes = parameter_shapes(module, example)
    uncut = uncut_stacks(shapes)
    if cuts := find_cuts(policy, shapes, has_teacher=has_teacher):
        module = module.with_cuts(cuts)
        shapes = parameter_shapes(module, example)
    return module, shapes, uncut


def _image_transform(config: DataConfig, folder: Path) -> ImageTransform:
    # Size, mean and deviation of the pixels come from the tower's folder, because its training fixed them.
    transform = load_image_transform(
        folder,
        image_size=config.image_size,
        crop_min_area=config.crop_min_area,
        random_crop=config.random_crop,
        flip=config.flip,
        color_jitter=config.color_jitter,
        rand_augment=config.rand_augment,
        reduced_jpeg=config.reduced_jpeg,
    )
    if (config.views or 1) > 1 and not transform.is_random:
        raise UserError(
            f"config.data.views={config.views}, but without an augmentation all views of an image are the "
            "same; set it to None, or set config.data.crop_min_area, config.data.flip or another "
            "augmentation."
        )
    return transform


def _open_tokenizer(
    folder: Path, tower: Tower, config: DataConfig, *, pretrained: bool
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, and set its `model_max_length` to `_text_length`.

    Raises UserError if the folder has no tokenizer, or if the tokenizer does not fit the tower.
    """
    tokenizer = load_tokenizer(
        folder,
        max_length=_text_length(tower, config.max_text_length, pretrained=pretrained),
        fixed_length=tower.fixed_length,
        lowercase=config.lowercase,
    )
    check_vocabulary(tokenizer, tower.config.vocab_size, "config.model.text.model")
    return tokenizer


def _text_length(tower: Tower, asked: int | None, *, pretrained: bool) -> int:
    """Return the number of tokens that texts are cut and padded to: `asked`, or a default for the tower.

    Raises UserError if the tower has fewer positions, or depends on another length by its training.
    """
    positions = tower.config.embedding.max_length
    if asked is None:
        # A tower without a mask must get the length of its training. A random one has no such length yet.
        is_given = tower.fixed_length and pretrained
        return positions if is_given else min(DEFAULT_TEXT_LENGTH, positions)
    if asked > positions:
        raise UserError(
            f"config.data.max_text_length={asked} is more than the text tower's {positions} positions; lower "
            "it, or set it to None."
        )
    if tower.fixed_length and pretrained and asked != positions:
        raise UserError(
            f"config.data.max_text_length={asked}, but a pretrained {tower.config.model_type} has no mask "
            f"and pools the last of {positions} tokens, even if it is padding, so texts of another length "
            "would get other embeddings; set it to None."
        )
    return asked


def example_batch(processors: Processors) -> dict[str, jax.Array]:
    """Return the smallest batch, which is enough to initialise parameters."""
    pixels = np.zeros((1, *processors.image_transform.output_shape), np.uint8)
    batch = {"pixel_values": pixels, **tokenize(processors.tokenizer, ["a"])}
    return {name: jnp.asarray(array) for name, array in batch.items()}


def _abstract(shapes: Tree, policy: Policy, config: Config, mesh: Mesh) -> Tree:
    shardings = flatten(parameter_shardings(shapes, mesh))
    towers = {*map(tower_name, TOWERS), TEACHER}

    def dtype(path: str) -> Any:
        # Trainable parameters are float32 masters, so that small updates are not rounded away. Locked
        # parameters have the dtype of the computation, which is float32 outside the towers.
        in_tower = path.partition("/")[0] in towers
        return config.model.dtype if in_tower and not policy.trainable[path] else jnp.float32

    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path), sharding=shardings[path])
            for path, leaf in flatten(shapes).items()
        }
    )


def named_key(seed: int, name: str, step: int | jax.Array) -> jax.Array:
    """Return the random key of one use (`name`) at one step.

    Keys are never stored, because a resumed run computes the same keys again.
    """
    # Python's hash() of a text differs between processes; its CRC-32 does not.
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step
    )


def first_parameters(model: Model) -> tuple[Tree, Tree]:
    """Return the parameters of step 0 as (trainable, frozen), float32, on the mesh.

    Pretrained towers are read from their folders. All other parameters are drawn by the run's seed.
    """
    shardings = {path: leaf.sharding for path, leaf in flatten(model.abstract).items()}
    # The files' loader returns uncut stacks, but the policy may have cut those of the model.
    pretrained = restack(_pretrained_parameters(model), model.abstract)
    read = {path: _place(array, shardings[path]) for path, array in flatten(pretrained).items()}
    batch = example_batch(model.processors)

    # The compiler removes the draws of parameters that are read, and makes each device draw only its own
    # part.
    def init() -> dict[str, jax.Array]:
        params = model.module.init(named_key(model.config.seed, "init", 0), batch)["params"]
        return {path: leaf for path, leaf in flatten(params).items() if path not in read}

    rest = {path: sharding for path, sharding in shardings.items() if path not in read}
    random = jax.jit(init, out_shardings=rest, compiler_options=_run_once(model.mesh))()
    return model.policy.split(unflatten(read | random))


def _run_once(mesh: Mesh) -> dict[str, int] | None:
    """Return options of the compiler for a program that runs only once."""
    # On CPU, optimization level 1 takes two thirds of the default level's time. Level 0, which JAX may be
    # told to take, is faster still but rounds otherwise.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    if is_cpu and not jax.config.values["jax_disable_most_optimizations"]:
        return {"xla_backend_optimization_level": 1}
    return None


def _pretrained_parameters(model: Model) -> dict[str, Any]:
    """Read the towers that the lock calls pretrained.

    A dual encoder also brings its projections, which fit only both of its own towers together.
    """
    config, paths = model.config, model.paths
    image, text = is_pretrained(config.policy.lock)
    if paths.teacher:
        student = paths.text_folder if text else None
        return pretrained_parameters(
            paths.image_folder, student, paths.hf_config["text_config"], config.model.dtype
        )
    if paths.is_whole and image and text:
        return _whole_dual_encoder(model)
    params = {}
    sides: tuple[tuple[Side, Path, bool], ...] = (
        ("image", paths.image_folder, image),
        ("text", paths.text_folder, text),
    )
    for side, folder, pretrained in sides:
        name = tower_name(side)
        if pretrained and side in model.own_towers:
            params[name] = model.own_towers[side][1]
        elif pretrained:
            params[name], report = load_tower(folder, getattr(model.module, name))
            log.info("%s", report)
    return params


def _whole_dual_encoder(model: Model) -> dict[str, Any]:
    config, folder = model.config, model.paths.image_folder
    module, params, _, report = load_dual_encoder(
        folder, dtype=config.model.dtype, hf_config=model.hf_config
    )
    log.info("%s", report)
    # If the weights were trained on after an export by lit_jax, loading falls back to the export's poolings
    # and projections. The run's model has the original ones, which these weights do not fit.
    as_trained = module.with_remat(config.remat).features_only()
    if as_trained.towers != model.module.with_cuts({}).towers:
        raise UserError(
            f"config.model.dual_encoder: {folder} was exported by lit_jax and then trained on with "
            "transformers; save it with transformers again, without the key 'lit_jax' in its config.json."
        )
    return params


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # Each process copies only the parts that its own devices hold.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
