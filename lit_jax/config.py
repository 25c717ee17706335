"""The config of a run: frozen dataclasses, and the function that makes them from a ConfigDict.

`configs/*.py` start from `default()`, a ConfigDict with the keys, change some values and return it.
`parse()` turns the ConfigDict into a `Config`, which is all that the rest of the code sees.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from ml_collections import config_dict

from lit_jax.config_schema import (
    Count,
    Duration,
    Fraction,
    Interval,
    NotNegative,
    Positive,
    Range,
    StepRange,
    UnknownKeyError,
    convert,
)
from lit_jax.credentials import take_keys
from lit_jax.optimizer_config import AdamW, OptimizerConfig

Side = Literal["image", "text"]
Pooling = Literal["pooler", "cls", "mean"]
Remat = Literal["none", "matmuls", "block"]
LossImplementation = Literal["auto", "dense", "blockwise"]
Rules = tuple[tuple[str, Any], ...]
TrainableRules = tuple[tuple[str, bool], ...]
RateRules = tuple[tuple[str, NotNegative], ...]

# The name of a text teacher's parameters, and (with a '_') the prefix of its inputs' names.
TEACHER = "teacher"

_Group = TypeVar("_Group")


def _free(default: Any) -> Any:
    """Return a field that may change when a run is resumed, because it does not change the result."""
    return dataclasses.field(default=default, metadata={"changes_result": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A tower: its source, its pooling and its projection."""

    # Hub id or local folder with config.json, weights, and a tokenizer or an image processor.
    model: str = ""
    # The features of an input: the model's own pooler, the CLS token, or the mean of all tokens.
    pooling: Pooling = "pooler"
    # The layer from the features to the embedding, with or without a bias. none: the embedding is the
    # features themselves.
    projection: Literal["none", "linear", "linear_bias"] = "linear"
    # New values for fields of the model's config.json, by name.
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two towers, or a whole dual encoder.

    With `dual_encoder` or `teacher`, `image` and the keys that join the towers keep their defaults. With
    `dual_encoder`, `text` keeps its defaults, too; the `overrides` of both towers can still be set.
    """

    # Hub id or local folder of a whole dual encoder: a CLIP, SigLIP, ALIGN ...
    dual_encoder: str = ""
    # Hub id or local folder of a CLIP whose text tower is the teacher: the text tower learns its outputs,
    # without images (AltCLIP, 2211.06679, section 3.2). The result's other parts are those of this CLIP.
    teacher: str = ""
    # The image tower.
    image: TowerConfig = TowerConfig()
    # The text tower.
    text: TowerConfig = TowerConfig()
    # The width of the embeddings, the output of both projections.
    projection_dim: Count = 512
    # The dtype of the computation, and of locked parameters.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The natural logarithm of the initial scale of the logits. 2.6592 is log(1 / 0.07) (CLIP, section 2.5).
    # The limits are those of float32.
    logit_scale_init: Annotated[float, Range(-87, 88)] = 2.6592
    # The initial value of a trainable bias that is added to the logits (SigLIP: -10). None: no bias.
    logit_bias_init: float | None = None
    # The largest scale of the logits (1 / temperature in ALIGN); the scale is clipped after each step (CLIP,
    # section 2.5: 100). None: no limit, as in LiT, ALIGN and SigLIP, whose final scale is about 118.
    logit_scale_max: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The parameters that train, and their rates: ordered (regex, value) rules; the first match wins.

    A rule matches the whole name of a parameter, such as 'vision_model/encoder/layer_11/mlp/fc1/kernel'.
    Without the number it matches the parameter in all blocks: '.*/layer/mlp/.*'.
    """

    # The preset of trainable rules (LiT, section 3.2). The first letter stands for the image tower, the
    # second for the text tower: L locked and pretrained, U unlocked and pretrained, u from scratch.
    lock: Literal["Lu", "LU", "uu", "Uu", "UU", "uL", "UL"] = "LU"
    # The number of last blocks of the locked tower that train, together with the final norm and the pooler.
    unlock_last: Annotated[int, Range(0)] = 0
    # (regex of parameter names, True to train or False to lock); tried before the rules of `lock`.
    trainable: TrainableRules = ()
    # (regex of parameter names, factor of schedule.learning_rate).
    learning_rate: RateRules = ()
    # (regex of parameter names, factor of optimizer.weight_decay).
    weight_decay: RateRules = ()
    # Learning rates that shrink towards the input by this factor for each block, as in BEiT's fine-tuning:
    # {"vision_model": 0.8}. They multiply the factors of `learning_rate`.
    layer_decay: dict[str, Annotated[float, Range(1e-6, 1)]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    # The kind of decay after the warm-up.
    name: Literal["cosine", "rsqrt", "linear", "constant"] = "cosine"
    # The learning rate at the end of the warm-up, the highest of the run.
    learning_rate: NotNegative = 1e-3
    # The linear rise from zero: '300 steps', '0.5 epochs' or '1e6 examples'.
    warmup: Duration = "0 steps"
    # The linear fall to zero at the end of the run, in steps, epochs or examples.
    cooldown: Duration = "0 steps"
    # The time constant of rsqrt, in steps, epochs or examples; other schedules ignore it.
    timescale: Duration = "10000 steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A data set."""

    # A folder or file in one of the formats of docs/data.md, or a Python script that makes such a folder.
    path: str = ""
    # The split to read, for data that have splits.
    split: str | None = None
    # The column, field or feature that holds the image.
    image_key: str = "image"
    # The column, field or feature that holds the captions.
    caption_key: str = "caption"
    # The column, field or feature that holds the label.
    label_key: str = "label"
    # The sampling weight of each language's captions: {"en": 1, "de": 3}. Empty: all captions alike.
    languages: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    # Captions for examples with a label but no caption: "a photo of a {}".
    templates: tuple[str, ...] = ()
    # Rows of a table that name the same image are one example; False: each row is an example.
    group_captions: bool = True
    # The number of examples to read, starting with the first. None: all.
    max_examples: Count | None = None
    # The weight in a mixture, relative to the other sources. None: the number of examples.
    weight: NotNegative | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitterConfig:
    """Random changes of the colours, in a random order, as in torchvision's ColorJitter."""

    # The strength: the factor of brightness lies between 1 - strength (at least 0) and 1 + strength.
    brightness: NotNegative = 0.0
    # The same for the factor of contrast.
    contrast: NotNegative = 0.0
    # The same for the factor of saturation.
    saturation: NotNegative = 0.0
    # The largest rotation of the hue in either direction, as a fraction of the colour circle.
    hue: Annotated[float, Range(0, 0.5)] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """Random operations of the same strength (1909.13719), as in torchvision's RandAugment."""

    # The number of operations on each image, one after the other. 0: none.
    operations: Annotated[int, Range(0)] = 0
    # The strength of each operation; 30 is the strongest.
    magnitude: Annotated[int, Range(0, 30)] = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, and the processing of images and texts."""

    # The training data, one source.
    train: SourceConfig = SourceConfig()
    # Several sources by name, instead of `train`.
    mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    # The number of tokens of a text, including special tokens. None: for a pretrained SigLIP tower the
    # number of its training, for others 32.
    max_text_length: Count | None = None
    # Texts are lower-cased before they are tokenized. None: only for SigLIP 2's tokenizer.
    lowercase: bool | None = None
    # The height and width of images, in pixels. None: those of the image processor.
    image_size: Count | None = None
    # The smallest fraction of an image's area that a random resized crop keeps. None: no such crop.
    crop_min_area: float | None = None
    # The image processor's crop is taken at a random place instead of the centre.
    random_crop: bool = False
    # Half of the images are flipped left to right.
    flip: bool = False
    # The number of fixed augmented views of an image. None: a new view each time the image is seen.
    views: Count | None = None
    # A folder of `python -m lit_jax.embed` that replaces a locked image tower: same losses, less work.
    image_embeddings: str = _free("")
    # A folder of `python -m lit_jax.embed --side=text` that replaces a locked text tower.
    text_embeddings: str = _free("")
    # Random changes of the colours.
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    # Random operations on images.
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    # Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size, which is faster.
    reduced_jpeg: bool = True
    # The largest fraction of the samples that may be bad; above it, the run stops.
    max_bad_fraction: Fraction = _free(0.01)
    # The number of worker processes that read data. 0: threads of this process read.
    workers: Annotated[int, Range(0)] = _free(0)
    # The number of threads of each worker.
    threads: Annotated[int, Range(0)] = _free(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The axes of the device mesh."""

    # The number of groups of devices that each hold all parameters. -1: all devices divided by fsdp.
    data: int = -1
    # The number of devices over which parameters and optimizer state are sharded.
    fsdp: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The checkpoints of a run: when they are saved, and which are kept."""

    # The time between two checkpoints, in steps, epochs or examples, or on the clock: '10 minutes'.
    every: Interval = "1000 steps"
    # The number of latest checkpoints that are kept.
    keep_last: Count = 2
    # The time between additional checkpoints that are never removed. None: there are none.
    keep_every: Duration | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The log of metrics: its interval and its destinations."""

    # The time between two reports, in steps, epochs or examples.
    every: Duration = "50 steps"
    # The first and the last step of a profile, which is written into the run folder for XProf: '100:110'.
    profile: StepRange | None = None
    # Metrics are also written to TensorBoard files in the run folder.
    tensorboard: bool = True
    # The project of Weights & Biases that gets the metrics. None: no project.
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """An evaluation for each of `languages`; '{language}' in a path stands for the language."""

    # The task.
    kind: Literal["zero_shot", "retrieval", "linear_probe", "few_shot"] = "zero_shot"
    # The data on which the model is measured.
    data: SourceConfig = SourceConfig()
    # linear_probe, few_shot: the data that the probe learns from.
    train: SourceConfig = SourceConfig()
    # zero_shot: a file of class names, in any format of docs/evaluation.md. None: the class file in the
    # data.
    classes: str | None = None
    # zero_shot: a file of templates, in any format of docs/evaluation.md. None: the templates in the class
    # file, or our own short list.
    templates: str | None = None
    # zero_shot: the meaning of the data's labels. given: labels are numbers or names of classes. sorted: the
    # sorted labels are in the order of the classes, where whole numbers are sorted by value. Folders whose
    # order by value differs from that as text need sorted_as_text or sorted_as_numbers.
    labels: Literal["given", "sorted", "sorted_as_text", "sorted_as_numbers"] = "given"
    # The data set's key in files about several data sets, and its name in results. "": the evaluation's name.
    dataset: str = ""
    # The languages, with one evaluation for each. Empty: one evaluation, for retrieval with all captions.
    languages: tuple[str, ...] = ()
    # few_shot: the numbers of training images for each class, with a probe for each number.
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)
    # few_shot: the number of random choices of the training images, over which results are averaged.
    draws: Count = 5
    # The rows of a batch, over all devices and processes.
    batch_size: Count = 256
    # The time between two measurements during training, such as '1000 steps'. None: not during training.
    every: Duration | None = None
    # Measure before the first step.
    at_start: bool = False
    # Measure after the last step.
    at_end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A loss among several."""

    # The kind of loss.
    kind: Literal["softmax", "sigmoid"] = "softmax"
    # The factor of the loss in the sum.
    weight: Positive = 1.0
    # The label smoothing of a softmax loss.
    label_smoothing: Fraction = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    # The seed of all random numbers of the run.
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    # The number of pairs in a step, over all devices and processes.
    batch_size: Count = 128
    # The length of the run: '1000 steps', '10 epochs' or '9e8 examples'.
    duration: Duration = "1000 steps"
    # The loss. mse is for a teacher, which needs it.
    loss: Literal["softmax", "sigmoid", "mse"] = "softmax"
    # Several losses by name, instead of `loss`: their weighted sum is minimised.
    losses: dict[str, LossConfig] = dataclasses.field(default_factory=dict)
    # "dense" computes the matrix of all similarities; "blockwise" never holds the whole matrix, with the same
    # result up to rounding; "auto" chooses by the batch size and the devices (docs/scale.md).
    loss_implementation: LossImplementation = "auto"
    # The label smoothing of the softmax loss.
    label_smoothing: Fraction = 0.0
    # The number of micro-batches in a step, for batches whose activations do not fit as a whole.
    accumulate: Count = 1
    # The towers.
    model: ModelConfig = ModelConfig()
    # The parameters that train.
    policy: PolicyConfig = PolicyConfig()
    # The optimizer, by its name, with the fields of that optimizer.
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamW)
    # The learning rate over the steps.
    schedule: ScheduleConfig = ScheduleConfig()
    # The training data.
    data: DataConfig = DataConfig()
    # The device mesh.
    mesh: MeshConfig = _free(MeshConfig())
    # Rematerialisation in towers that train. The forward pass keeps everything (none), the results of matrix
    # products (matmuls) or the inputs of the blocks (block); the backward pass recomputes the rest.
    remat: Remat = _free("none")
    # The checkpoints.
    checkpoint: CheckpointConfig = _free(CheckpointConfig())
    # The log of metrics.
    log: LogConfig = _free(LogConfig())
    # Evaluations by name.
    evals: dict[str, EvalConfig] = dataclasses.field(
        default_factory=dict, metadata={"changes_result": False}
    )
    # html: a page with results, samples, confusions and curves.
    report: Literal["none", "html"] = _free("none")


def loss_kinds(config: Config) -> set[str]:
    """Return the kinds of losses that a run minimises."""
    return {term.kind for term in config.losses.values()} or {config.loss}


def default() -> config_dict.ConfigDict:
    """Return a ConfigDict with every key of `Config` at its default, and of the optimizer the name alone.

    The optimizer's other fields and their defaults depend on its name; a recipe sets those that it changes.
    """
    raw = dataclasses.asdict(Config())
    return config_dict.ConfigDict(raw | {"optimizer": {"name": raw["optimizer"]["name"]}})


def parse(raw: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Return the `Config` from `raw`, a ConfigDict or the content of a run's config.json; see `parse_as`."""
    return parse_as(Config, raw.to_dict() if isinstance(raw, config_dict.ConfigDict) else raw)


def parse_as(kind: type[_Group], raw: Mapping[str, Any], name: str = "config") -> _Group:
    """Return one of the dataclasses above with the values in `raw`; `name` is its name in messages.

    Secret keys in addresses are left out. Raises UserError for an unknown key, with the nearest known key,
    and for a value of the wrong type or out of its range.
    """
    try:
        return convert(kind, take_keys(raw), name)
    except UnknownKeyError as unknown:
        raise unknown.as_user_error(kind) from None
