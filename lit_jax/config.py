"""The config of a run: frozen dataclasses, and the one function that makes them from a ConfigDict.

`configs/*.py` start from `default()`, a ConfigDict with every key, change some of them and return it.
`parse()` turns it into a `Config`; after that nothing in the code sees a ConfigDict.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from ml_collections import config_dict

from lit_jax.config_schema import (
    Count,
    Decay,
    Duration,
    Fraction,
    NotNegative,
    Positive,
    Range,
    UnknownKeyError,
    convert,
)
from lit_jax.credentials import take_keys

Side = Literal["image", "text"]
Pooling = Literal["pooler", "cls", "mean"]
Remat = Literal["none", "matmuls", "block"]
LossImplementation = Literal["auto", "dense", "blockwise"]
Rules = tuple[tuple[str, Any], ...]
TrainableRules = tuple[tuple[str, bool], ...]
RateRules = tuple[tuple[str, NotNegative], ...]

# The name of a text teacher's parameters, and the prefix of the names of its inputs (with a '_').
TEACHER = "teacher"

_Group = TypeVar("_Group")


def _free(default: Any) -> Any:
    """Return a field that may change when a run is resumed, because it does not change the result."""
    return dataclasses.field(default=default, metadata={"changes_result": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One tower: its source, its pooling and its projection."""

    # Hub id or local folder with config.json, weights, and a tokenizer or an image processor.
    model: str = ""
    # The features of an input: the model's own pooler, the CLS token, or the mean of all tokens.
    pooling: Pooling = "pooler"
    # The layer from the features to the embedding, with or without a bias. none: the features are the
    # embedding.
    projection: Literal["none", "linear", "linear_bias"] = "linear"
    # Fields of the model's config.json that are replaced, by name.
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two towers, or a whole dual encoder.

    Beside `dual_encoder` or `teacher`, `image` and the keys that join the towers keep their defaults. So does
    `text` beside a dual encoder, where `overrides` of both towers can be set.
    """

    # Hub id or local folder of a whole dual encoder: a CLIP, SigLIP, ALIGN ...
    dual_encoder: str = ""
    # Hub id or local folder of a CLIP whose text tower is a teacher: the text tower learns its outputs,
    # without images (AltCLIP, 2211.06679, section 3.2). The other parts of the result are the teacher's.
    teacher: str = ""
    # The image tower.
    image: TowerConfig = TowerConfig()
    # The text tower.
    text: TowerConfig = TowerConfig()
    # The width of the embeddings, which both projections have.
    projection_dim: Count = 512
    # The dtype of the computation, and of locked parameters.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The first value of the logits' scale, as its natural logarithm. 2.6592 is log(1 / 0.07) (CLIP, section
    # 2.5). The limits are those of float32.
    logit_scale_init: Annotated[float, Range(-87, 88)] = 2.6592
    # The first value of a trainable bias that is added to the logits (SigLIP: -10). None: no bias.
    logit_bias_init: float | None = None
    # The largest scale of the logits (1 / temperature in ALIGN), to which it is cut after each step (CLIP,
    # section 2.5: 100). None: no limit, as in LiT, ALIGN and SigLIP, whose own scale is about 118.
    logit_scale_max: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The parameters that train, and their rates: ordered (regex, value) rules; the first match wins.

    A rule matches the whole name of a parameter, such as 'vision_model/encoder/layer_11/mlp/fc1/kernel', in
    which the number may be left out to mean all blocks: '.*/layer/mlp/.*'.
    """

    # The preset of trainable rules (LiT, section 3.2): the first letter is for the image tower, the second
    # for the text tower; L locked pretrained, U unlocked pretrained, u from scratch.
    lock: Literal["Lu", "LU", "uu", "Uu", "UU", "uL", "UL"] = "LU"
    # The number of last blocks of the locked tower that train, with the norm and pooler behind them.
    unlock_last: Annotated[int, Range(0)] = 0
    # (regex of parameter names, True to train or False to lock); tried before those of `lock`.
    trainable: TrainableRules = ()
    # (regex of parameter names, factor of schedule.learning_rate).
    learning_rate: RateRules = ()
    # (regex of parameter names, factor of optimizer.weight_decay).
    weight_decay: RateRules = ()
    # Learning rates that shrink towards the input, a factor a block, as BEiT is fine-tuned:
    # {"vision_model": 0.8}. They multiply those of `learning_rate`.
    layer_decay: dict[str, Annotated[float, Range(1e-6, 1)]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of the trainable parameters."""

    # The update rule.
    name: Literal["adamw", "adafactor", "lion", "lamb"] = "adamw"
    # The decay of the first moment (momentum), a step.
    b1: Decay = 0.9
    # The decay of the second moment, a step; Adafactor's cap of it.
    b2: Decay = 0.999
    # The number that is added to the root of the second moment.
    eps: NotNegative = 1e-8
    # The dtype in which the first moment is kept.
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    # Decoupled weight decay: each step subtracts learning_rate * weight_decay * parameter.
    weight_decay: NotNegative = 0.0
    # The largest norm of the gradient of all trainable parameters, to which it is clipped. None: no limit.
    clip_norm: Positive | None = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    # The form of the decay behind the warm-up.
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
    """One data set."""

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
    # The weight of each language when a caption is drawn: {"en": 1, "de": 3}. Empty: all captions alike.
    languages: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    # Captions for examples with a label but no caption: "a photo of a {}".
    templates: tuple[str, ...] = ()
    # Rows of a table that name the same image are one example; False: each row is an example.
    group_captions: bool = True
    # The number of examples to read, from the first on. None: all.
    max_examples: Count | None = None
    # The share in a mixture, relative to those of the other sources. None: the number of examples.
    weight: NotNegative | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitterConfig:
    """Changes by random factors, in a random order, as torchvision's ColorJitter of the same strengths."""

    # The strength: the factor of brightness lies between 1 - strength (at least 0) and 1 + strength.
    brightness: NotNegative = 0.0
    # The strength of the factor of contrast, as that of brightness.
    contrast: NotNegative = 0.0
    # The strength of the factor of saturation, as that of brightness.
    saturation: NotNegative = 0.0
    # The largest turn of the hue in either direction, as a part of the colour circle.
    hue: Annotated[float, Range(0, 0.5)] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """Random operations of one strength (1909.13719), as torchvision's RandAugment."""

    # The number of operations an image, one after the other. 0: none.
    operations: Annotated[int, Range(0)] = 0
    # The strength of each operation; 30 is the strongest.
    magnitude: Annotated[int, Range(0, 30)] = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, and the processing of images and texts."""

    # The training data, one source.
    train: SourceConfig = SourceConfig()
    # Several sources by name, in the place of `train`.
    mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    # The tokens of a text, special ones included. None: as many as a pretrained SigLIP tower was trained
    # with; elsewhere 32.
    max_text_length: Count | None = None
    # Texts become lower-case letters before they are tokenized. None: for SigLIP 2's tokenizer alone.
    lowercase: bool | None = None
    # The height and width of images, in pixels. None: those of the image processor.
    image_size: Count | None = None
    # The least part of an image's area that a random resized crop keeps. None: no such crop.
    crop_min_area: float | None = None
    # The image processor's crop is taken at a random place, not from the middle.
    random_crop: bool = False
    # Half of the images are flipped left to right.
    flip: bool = False
    # The number of fixed augmented views of an image. None: a new view each time the image is seen.
    views: Count | None = None
    # A folder of `python -m lit_jax.embed`, in the place of a locked image tower: same losses, less work.
    image_embeddings: str = _free("")
    # A folder of `python -m lit_jax.embed --side=text`, in the place of a locked text tower.
    text_embeddings: str = _free("")
    # Random changes of the colours.
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    # Random operations on images.
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    # Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size, which is faster.
    reduced_jpeg: bool = True
    # The largest part of all samples that may be bad; with more, the run stops.
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
    # The number of devices over which parameters and optimizer state are split.
    fsdp: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The checkpoints of a run: when they are saved, and which are kept."""

    # The time between two checkpoints, in steps, epochs or examples.
    every: Duration = "1000 steps"
    # The number of latest checkpoints that are kept.
    keep_last: Count = 2
    # The time between checkpoints that are saved, too, and never removed. None: there are none.
    keep_every: Duration | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The log of metrics: how often, and where to."""

    # The time between two reports, in steps, epochs or examples.
    every: Duration = "50 steps"
    # Metrics go to TensorBoard files in the run folder, too.
    tensorboard: bool = True
    # The project of Weights & Biases that gets the metrics. None: no project.
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation, or with several languages one for each; '{language}' in a path stands for it."""

    # The task.
    kind: Literal["zero_shot", "retrieval", "linear_probe", "few_shot"] = "zero_shot"
    # The data that are measured.
    data: SourceConfig = SourceConfig()
    # linear_probe, few_shot: the data that the probe learns from.
    train: SourceConfig = SourceConfig()
    # zero_shot: a file of class names, of any form in docs/evaluation.md. None: the one that lies in the
    # data.
    classes: str | None = None
    # zero_shot: a file of templates, of any form in docs/evaluation.md. None: those in the class file, or a
    # short list of our own.
    templates: str | None = None
    # zero_shot: the meaning of the data's labels. given: they are numbers or names of classes. sorted: in
    # sorted order they are the classes; labels that are all whole numbers have the order of numbers. Folders
    # whose two orders differ need sorted_as_text or sorted_as_numbers.
    labels: Literal["given", "sorted", "sorted_as_text", "sorted_as_numbers"] = "given"
    # The data set's key in files of many, and its name in results; "": the evaluation's name.
    dataset: str = ""
    # The languages of the captions that retrieval takes, one evaluation for each. Empty: all captions.
    languages: tuple[str, ...] = ()
    # few_shot: the numbers of training images a class, a probe for each.
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)
    # few_shot: the number of random choices of these images, whose results are averaged.
    draws: Count = 5
    # The rows a batch, over all devices and processes.
    batch_size: Count = 256
    # The time between two measurements during training, such as '1000 steps'. None: not during training.
    every: Duration | None = None
    # Measure before the first step.
    at_start: bool = False
    # Measure after the last step.
    at_end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """One of several losses."""

    # The loss.
    kind: Literal["softmax", "sigmoid"] = "softmax"
    # Its factor in the sum.
    weight: Positive = 1.0
    # For the softmax loss.
    label_smoothing: Fraction = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    # The number that all random numbers of the run follow from.
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    # The pairs a step, over all devices and processes.
    batch_size: Count = 128
    # The length of the run: '1000 steps', '10 epochs' or '9e8 examples'.
    duration: Duration = "1000 steps"
    # mse: with a teacher, and only then.
    loss: Literal["softmax", "sigmoid", "mse"] = "softmax"
    # Several losses by name, instead of `loss`: their weighted sum is minimised.
    losses: dict[str, LossConfig] = dataclasses.field(default_factory=dict)
    # "dense" computes the matrix of all similarities; "blockwise" does without, the same up to rounding;
    # "auto" decides by the batch size and the devices (docs/scale.md).
    loss_implementation: LossImplementation = "auto"
    # For the softmax loss.
    label_smoothing: Fraction = 0.0
    # The number of micro-batches a step, for batches whose activations do not fit as a whole.
    accumulate: Count = 1
    # The towers.
    model: ModelConfig = ModelConfig()
    # The parameters that train.
    policy: PolicyConfig = PolicyConfig()
    # The optimizer.
    optimizer: OptimizerConfig = OptimizerConfig()
    # The learning rate over the steps.
    schedule: ScheduleConfig = ScheduleConfig()
    # The training data.
    data: DataConfig = DataConfig()
    # The device mesh.
    mesh: MeshConfig = _free(MeshConfig())
    # Rematerialisation in towers that train. The forward pass keeps everything (none), the results of matrix
    # products (matmuls) or the inputs of the blocks (block); the backward pass computes the rest again.
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
    """Return the kinds of loss that a run minimises."""
    return {term.kind for term in config.losses.values()} or {config.loss}


def default() -> config_dict.ConfigDict:
    """Return a ConfigDict with every key of `Config` at its default."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()))


def parse(raw: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Return the `Config` that `raw` (a ConfigDict, or config.json of a run) describes; see `parse_as`."""
    return parse_as(Config, raw.to_dict() if isinstance(raw, config_dict.ConfigDict) else raw)


def parse_as(kind: type[_Group], raw: Mapping[str, Any], name: str = "config") -> _Group:
    """Return one of the dataclasses above with the values in `raw`; `name` is how messages call it.

    Secret keys in addresses are no part of it. Raise UserError on an unknown key, with the nearest known one,
    and on a value of the wrong type or out of its range.
    """
    try:
        return convert(kind, take_keys(raw), name)
    except UnknownKeyError as unknown:
        raise unknown.as_user_error(kind) from None
