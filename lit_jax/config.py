"""The config of a run: frozen dataclasses, and the one function that makes them from a ConfigDict.

`configs/*.py` start from `default()`, a ConfigDict with every key, change some of them and return it.
`parse()` turns it into a `Config`; after that nothing in the code sees a ConfigDict.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import config_dict

from lit_jax.config_keys import nearest_key
from lit_jax.config_values import (
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
from lit_jax.errors import UserError

Side = Literal["image", "text"]
Pooling = Literal["pooler", "cls", "mean"]
Remat = Literal["none", "matmuls", "block"]
Rules = tuple[tuple[str, Any], ...]
TrainableRules = tuple[tuple[str, bool], ...]
RateRules = tuple[tuple[str, NotNegative], ...]

# The name of a text teacher's parameters; with '_' behind it, how the names of its inputs start.
TEACHER = "teacher"


def _free(default: Any) -> Any:
    """Return a field that may change when a run is resumed, because it does not change the result."""
    return dataclasses.field(default=default, metadata={"changes_result": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One tower: where it comes from, and what is done with its outputs."""

    # Hub id or local folder with config.json, weights, and a tokenizer or an image processor.
    model: str = ""
    pooling: Pooling = "pooler"
    projection: Literal["none", "linear", "linear_bias"] = "linear"
    # Fields of config.json that are replaced.
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two towers, or a whole dual encoder: Hub id or folder of a CLIP, SigLIP, ALIGN ...

    With a teacher, training needs no images: the text tower learns the outputs of the teacher's (AltCLIP,
    2211.06679, section 3.2). The result is an AltCLIP, whose other parts are the teacher's.
    """

    # Beside dual_encoder or teacher, `image` and what joins the towers keep their defaults. So does `text`
    # beside a dual encoder, but there overrides of both towers can be set.
    dual_encoder: str = ""
    # Hub id or folder of a CLIP.
    teacher: str = ""
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    projection_dim: Count = 512
    # The dtype of the computation, and of locked parameters.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The logits are scaled by its exp, which float32 holds up to here. 2.6592 is log(1 / 0.07) (CLIP, section
    # 2.5).
    logit_scale_init: Annotated[float, Range(-87, 88)] = 2.6592
    # A number adds a trainable bias to the logits (SigLIP: -10).
    logit_bias_init: float | None = None
    # After each step the logits' scale (1 / temperature in ALIGN) is cut to this (CLIP, section 2.5: 100).
    # None: it has no limit, as in LiT, ALIGN and SigLIP, whose own scale is about 118.
    logit_scale_max: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which parameters train, and how: ordered (regex, value) rules, the first match wins.

    A rule matches the whole name of a parameter, such as 'vision_model/encoder/layer_11/mlp/fc1/kernel', in
    which the number may be left out to mean all blocks: '.*/layer/mlp/.*'.

    `lock` names the trainable rules (LiT section 3.2): first letter image, second text;
    L locked pretrained, U unlocked pretrained, u from scratch. Rules of `trainable` are tried before them.
    """

    lock: Literal["Lu", "LU", "uu", "Uu", "UU", "uL", "UL"] = "LU"
    # The last so many blocks of the locked tower train, and what comes after them: norm and pooler.
    unlock_last: Annotated[int, Range(0)] = 0
    # (regex, whether it trains)
    trainable: TrainableRules = ()
    # (regex, multiplier)
    learning_rate: RateRules = ()
    # (regex, multiplier)
    weight_decay: RateRules = ()
    # Learning rates that shrink towards the input, a factor a block, as BEiT is fine-tuned:
    # {"vision_model": 0.8}. They multiply those of `learning_rate`.
    layer_decay: dict[str, Annotated[float, Range(1e-6, 1)]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of the trainable parameters."""

    name: Literal["adamw", "adafactor", "lion", "lamb"] = "adamw"
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: NotNegative = 1e-8
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    # Decoupled: each step subtracts learning_rate * weight_decay * parameter.
    weight_decay: NotNegative = 0.0
    # The largest norm of the gradient of all trainable parameters.
    clip_norm: Positive | None = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: Literal["cosine", "rsqrt", "linear", "constant"] = "cosine"
    # At the end of the warm-up.
    learning_rate: NotNegative = 1e-3
    warmup: Duration = "0 steps"
    # Linear to zero at the end.
    cooldown: Duration = "0 steps"
    # For rsqrt alone.
    timescale: Duration = "10000 steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set."""

    # A folder or file in one of the formats of docs/data.md, or a Python script that makes such a folder.
    path: str = ""
    split: str | None = None
    # The three keys are names of columns, fields or features.
    image_key: str = "image"
    caption_key: str = "caption"
    label_key: str = "label"
    # How often captions of each language are drawn: {"en": 1, "de": 3}. Empty: all captions alike.
    languages: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    # Captions for examples with a label but no caption: "a photo of a {}".
    templates: tuple[str, ...] = ()
    # Rows of a table that name the same image are one example; False: each row is an example.
    group_captions: bool = True
    # Only the first so many examples.
    max_examples: Count | None = None
    # The share in a mixture; None: the number of examples.
    weight: NotNegative | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitterConfig:
    """Changes by random factors, in a random order, as torchvision's ColorJitter of the same strengths."""

    # Factors between 1 - strength (at least 0) and 1 + strength.
    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    # At most this part of the colour circle, in either direction.
    hue: Annotated[float, Range(0, 0.5)] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """Random operations of one strength (1909.13719), as torchvision's RandAugment."""

    # Operations an image, one after the other; 0: none.
    operations: Annotated[int, Range(0)] = 0
    # 30 is the strongest.
    magnitude: Annotated[int, Range(0, 30)] = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, and what is done with images and texts."""

    train: SourceConfig = SourceConfig()
    # Several sources by name, instead of `train`.
    mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    # Tokens, special ones included. None: what a pretrained SigLIP tower was trained with; elsewhere 32.
    max_text_length: Count | None = None
    # Whether texts become lower-case letters before they are tokenized. None: for SigLIP 2's tokenizer alone.
    lowercase: bool | None = None
    # Pixels; None: what the image processor says.
    image_size: Count | None = None
    # A random resized crop of at least this part of the area; None: no such crop.
    crop_min_area: float | None = None
    # What the image processor crops out of the middle is taken at a random place.
    random_crop: bool = False
    # Left-right, half of the time.
    flip: bool = False
    # An image has so many fixed augmented views; None: a new view each time it is seen.
    views: Count | None = None
    # Folders of `python -m lit_jax.embed`, in the place of a locked tower: same losses, less work.
    image_embeddings: str = _free("")
    text_embeddings: str = _free("")
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    # Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size.
    reduced_jpeg: bool = True
    # The run stops when more samples than this part are bad.
    max_bad_fraction: Fraction = _free(0.01)
    # Worker processes; 0: threads of this process.
    workers: Annotated[int, Range(0)] = _free(0)
    # Threads of each worker.
    threads: Annotated[int, Range(0)] = _free(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The axes of the device mesh."""

    # -1: all devices that fsdp leaves.
    data: int = -1
    fsdp: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and which checkpoints are kept."""

    every: Duration = "1000 steps"
    keep_last: Count = 2
    # Checkpoints at multiples of this are also saved, and never removed.
    keep_every: Duration | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """When metrics are reported, and where to."""

    every: Duration = "50 steps"
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation, or with several languages one for each; '{language}' in a path stands for it."""

    kind: Literal["zero_shot", "retrieval", "linear_probe", "few_shot"] = "zero_shot"
    data: SourceConfig = SourceConfig()
    # linear_probe, few_shot: the data that the probe learns from.
    train: SourceConfig = SourceConfig()
    # zero_shot: files of any form in docs/evaluation.md. Without a class file those that lie in the data;
    # without templates those in the class file, or a short list of our own.
    classes: str | None = None
    templates: str | None = None
    # sorted: the data's labels, in their order, are the classes. Labels that are all whole numbers have the
    # order of numbers; folders whose two orders differ need one of the last two.
    labels: Literal["given", "sorted", "sorted_as_text", "sorted_as_numbers"] = "given"
    # The data set's key in files of many, and its name in results; "": the evaluation's name.
    dataset: str = ""
    # Retrieval takes captions in these languages; all captions if none is named.
    languages: tuple[str, ...] = ()
    # few_shot: training images of each class.
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)
    # few_shot: random choices of these images, whose results are averaged.
    draws: Count = 5
    batch_size: Count = 256
    # During training, such as '1000 steps'.
    every: Duration | None = None
    # Before the first step.
    at_start: bool = False
    # After the last step.
    at_end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    # Pairs a step, over all devices and processes.
    batch_size: Count = 128
    duration: Duration = "1000 steps"
    # mse: with a teacher, and only then.
    loss: Literal["softmax", "sigmoid", "mse"] = "softmax"
    # How a contrastive loss is computed: "lean" without a similarity matrix, the same up to rounding; "auto"
    # decides by the batch size and the devices (docs/scale.md).
    loss_form: Literal["auto", "global", "lean"] = "auto"
    # For the softmax loss.
    label_smoothing: Fraction = 0.0
    # Micro-batches a step, where the activations of a whole batch do not fit.
    accumulate: Count = 1
    model: ModelConfig = ModelConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = _free(MeshConfig())
    # Rematerialisation in towers that train. The forward pass keeps everything (none), the results of matrix
    # products (matmuls) or the inputs of the blocks (block); the backward pass computes the rest again.
    remat: Remat = _free("none")
    checkpoint: CheckpointConfig = _free(CheckpointConfig())
    log: LogConfig = _free(LogConfig())
    evals: dict[str, EvalConfig] = dataclasses.field(
        default_factory=dict, metadata={"changes_result": False}
    )
    # html: a page with the results, samples, confusions and curves, in the run's folder.
    report: Literal["none", "html"] = _free("none")


def default() -> config_dict.ConfigDict:
    """Return a ConfigDict with every key of `Config` at its default."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()))


def parse(raw: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Return the `Config` that `raw` (a ConfigDict, or config.json of a run) describes.

    The keys of addresses are no part of it; see credentials.py.

    Raises UserError on an unknown key, with the nearest known one, and on a value of the wrong type or
    out of its range.
    """
    if isinstance(raw, config_dict.ConfigDict):
        raw = raw.to_dict()
    try:
        return convert(Config, take_keys(raw), "config")
    except UnknownKeyError as unknown:
        name = nearest_key(Config, unknown.group, unknown.key)
        raise UserError(f"{unknown} is not a config key; {name}.") from None


def parse_arg(
    arg: str, *, variants: tuple[str, ...], options: Mapping[str, type]
) -> tuple[str, dict[str, Any]]:
    """Return the argument of --config=file.py:base,batch=1024, read.

    The result is the variant (the first of `variants` if none is named) and the options that are given.

    Raises UserError on anything else.
    """
    variant, given = None, {}
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if not equals and key in variants:
            if variant is not None:
                raise UserError(
                    f"{variant!r} and {key!r} are two variants of this config; name one."
                )
            variant = key
        elif equals and key in options:
            try:
                given[key] = options[key](text)
            except ValueError:
                raise UserError(
                    f"{part!r}: {key} must be of type {options[key].__name__}."
                ) from None
        else:
            known = (*variants, *(f"{name}=..." for name in options))
            raise UserError(f"{part!r} is no variant of this config; known are {', '.join(known)}.")
    return variant or variants[0], given
