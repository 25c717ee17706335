"""What a run is: frozen dataclasses, and the one door through which a ConfigDict becomes them.

`configs/*.py` start from `default()`, a ConfigDict with every key, change some of them and return it.
`parse()` turns it into a `Config`; after that nothing in the code sees a ConfigDict.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ml_collections import config_dict

from lit_jax.config_keys import nearest_key
from lit_jax.credentials import take_keys
from lit_jax.errors import UserError


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    least: int | float
    most: int | float = math.inf


# Step numbers and sizes are 32-bit integers on a device.
MOST = 2**31 - 1
# A number that float32 cannot hold would be infinite on a device.
LARGEST_FLOAT = 3.4e38

Count = Annotated[int, Range(1, MOST)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(1e-6)]
Fraction = Annotated[float, Range(0, 1)]
# A moment with a decay of 1 never moves. Adafactor, whose b2 is a cap, is below this one for 3e7 steps.
Decay = Annotated[float, Range(0, 0.999999)]
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s+(step|epoch|example)s?\s*")
Duration = Annotated[str, _DURATION]  # "300 steps", "2.5 epochs" or "9e8 examples"; see `steps`

Pooling = Literal["pooler", "cls", "mean"]
Remat = Literal["none", "matmuls", "block"]
Rules = tuple[tuple[str, Any], ...]
TrainableRules = tuple[tuple[str, bool], ...]
RateRules = tuple[tuple[str, NotNegative], ...]

# Where the parameters of a text tower's teacher lie, and with '_' what the names of its inputs start with.
TEACHER = "teacher"


def _free(default: Any) -> Any:
    """A field that may change when a run is resumed: it does not change the result."""
    return dataclasses.field(default=default, metadata={"changes_result": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    model: str = ""  # Hub id or local folder: config.json, weights, tokenizer or preprocessor
    pooling: Pooling = "pooler"
    projection: Literal["none", "linear", "linear_bias"] = "linear"
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of config.json's fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two towers, or a whole dual encoder: Hub id or folder of a CLIP, SigLIP, ALIGN ...

    With a teacher, training needs no images: the text tower learns the outputs of the teacher's (AltCLIP,
    2211.06679, section 3.2). The result is an AltCLIP, whose other parts are the teacher's.
    """

    # Beside one of these two, image and what joins the towers stay as they are here. So does text beside a
    # dual encoder, but there overrides of both can be set.
    dual_encoder: str = ""
    teacher: str = ""  # Hub id or folder of a CLIP
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    projection_dim: Count = 512
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the computation, and of locked parameters
    )
    logit_scale_init: float = (
        2.6592  # log(1 / 0.07), CLIP section 2.5; the logits are scaled by its exp
    )
    logit_bias_init: float | None = (
        None  # a number adds a trainable bias to the logits (SigLIP: -10)
    )
    # After each step the logits' scale (1 / temperature in ALIGN) is cut to this (CLIP, section 2.5: 100).
    # None: it has no limit, as in LiT, ALIGN and SigLIP, whose own scale is about 118.
    logit_scale_max: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which parameters train, and how: ordered (regex, value) rules, the first match wins.

    `lock` names the trainable rules (LiT section 3.2): first letter image, second text;
    L locked pretrained, U unlocked pretrained, u from scratch. Rules below are tried before its own.
    """

    lock: Literal["Lu", "LU", "uu", "Uu", "UU", "uL", "UL"] = "LU"
    trainable: TrainableRules = ()  # (regex, bool)
    learning_rate: RateRules = ()  # (regex, multiplier)
    weight_decay: RateRules = ()  # (regex, multiplier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "lion", "lamb"] = "adamw"
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: NotNegative = 1e-8
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: NotNegative = (
        0.0  # decoupled: each step takes away learning_rate * weight_decay * parameter
    )
    clip_norm: Positive | None = 1.0  # of the gradient of the trainable parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: Literal["cosine", "rsqrt", "linear", "constant"] = "cosine"
    learning_rate: NotNegative = 1e-3  # at the end of the warm-up
    warmup: Duration = "0 steps"
    cooldown: Duration = "0 steps"  # linear to zero at the end
    timescale: Duration = "10000 steps"  # of rsqrt alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str = ""  # "demo", or a folder or file in one of the formats of docs/data.md
    split: str | None = None
    image_key: str = "image"  # the three keys are names of columns, fields or features
    caption_key: str = "caption"
    label_key: str = "label"
    languages: dict[str, NotNegative] = dataclasses.field(
        default_factory=dict
    )  # of captions: how often each is drawn, {"en": 1, "de": 3}; none given: all captions alike
    templates: tuple[
        str, ...
    ] = ()  # "a photo of a {}": captions of what has a label but no caption
    # Rows of a table that name the same image are one example; False: each row is an example.
    group_captions: bool = True
    max_examples: Count | None = None  # only the first so many
    weight: NotNegative | None = None  # in a mixture: its share; None: its number of examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitterConfig:
    """Changes by random factors, in a random order, as torchvision's ColorJitter of the same strengths."""

    brightness: NotNegative = 0.0  # factors between 1 - strength (at least 0) and 1 + strength
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Annotated[float, Range(0, 0.5)] = 0.0  # at most this part of the colour circle, either way


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """Random operations of one strength (1909.13719), as torchvision's RandAugment."""

    operations: Annotated[int, Range(0)] = 0  # an image, in a row; 0: none
    magnitude: Annotated[int, Range(0, 30)] = 9  # 30: as strong as it gets


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: SourceConfig = SourceConfig()
    mixture: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)  # instead of train
    # Tokens, special ones included. None: what a pretrained SigLIP tower was trained with; elsewhere 32.
    max_text_length: Count | None = None
    # Whether texts become lower-case letters before they are tokenized. None: for SigLIP 2's tokenizer alone.
    lowercase: bool | None = None
    image_size: Count | None = None  # pixels; None: what the image processor says
    crop_min_area: float | None = None  # random resized crop of at least this part; None: none
    random_crop: bool = False  # what the image processor crops out of the middle, at a random place
    flip: bool = False  # left-right, half of the time
    views: Count | None = (
        None  # an image has so many fixed augmented views, not a new one each time it is seen
    )
    # Folders of `python -m lit_jax.embed`, in the place of a locked tower: same losses, less work.
    image_embeddings: str = _free("")
    text_embeddings: str = _free("")
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    reduced_jpeg: bool = True  # large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size
    max_bad_fraction: Fraction = _free(0.01)  # of undecodable samples, then the run stops
    workers: Annotated[int, Range(0)] = _free(0)  # processes; 0: threads of this one
    threads: Annotated[int, Range(0)] = _free(8)  # of each worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # -1: all devices that fsdp leaves
    fsdp: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Duration = "1000 steps"
    keep_last: Count = 2
    keep_every: Duration | None = None  # also saved so often, and kept for good


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: Duration = "50 steps"
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation, or with several languages one for each; '{language}' in a path stands for it."""

    kind: Literal["zero_shot", "retrieval", "linear_probe", "few_shot"] = "zero_shot"
    data: SourceConfig = SourceConfig()
    train: SourceConfig = SourceConfig()  # linear_probe, few_shot: what the probe learns from
    # zero_shot: files of any form in docs/evaluation.md. Without a class file those that lie in the data;
    # without templates those in the class file, or a short list of our own.
    classes: str | None = None
    templates: str | None = None
    # sorted: the data's labels, in their order, are the classes. Labels that are all whole numbers have the
    # order of numbers; folders whose two orders differ need one of the last two.
    labels: Literal["given", "sorted", "sorted_as_text", "sorted_as_numbers"] = "given"
    dataset: str = ""  # its key in files of many, its name in results; "": the evaluation's name
    # Retrieval takes captions in these languages; all captions if none is named.
    languages: tuple[str, ...] = ()
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)  # few_shot: training images of each class
    draws: Count = 5  # few_shot: of those images, whose results are averaged
    batch_size: Count = 256
    every: Duration | None = None  # during training, such as '1000 steps'
    at_start: bool = False  # before the first step
    at_end: bool = True  # after the last one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    batch_size: Count = 128  # pairs a step, over all devices and processes
    duration: Duration = "1000 steps"
    loss: Literal["softmax", "sigmoid", "mse"] = "softmax"  # mse: with a teacher, and only then
    # How a contrastive loss is computed: "lean" without a similarity matrix, the same up to rounding; "auto"
    # decides by the batch size and the devices (docs/scale.md).
    loss_form: Literal["auto", "global", "lean"] = "auto"
    label_smoothing: Fraction = 0.0  # of the softmax loss
    accumulate: Count = 1  # micro-batches of a step, if a whole batch of activations does not fit
    model: ModelConfig = ModelConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = _free(MeshConfig())
    # What the forward pass of a tower that trains keeps for the backward one, which computes the rest again:
    # all (none), the results of matrix products (matmuls), or only what goes into each block (block).
    remat: Remat = _free("none")
    checkpoint: CheckpointConfig = _free(CheckpointConfig())
    log: LogConfig = _free(LogConfig())
    evals: dict[str, EvalConfig] = dataclasses.field(
        default_factory=dict, metadata={"changes_result": False}
    )
    report: Literal["none", "html", "demo"] = _free("none")  # demo: also the demo's own pictures


def default() -> config_dict.ConfigDict:
    """A ConfigDict with every key of `Config` at its default."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()))


def parse(raw: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Return the `Config` that `raw` (a ConfigDict, or config.json of a run) describes.

    The keys of addresses are no part of it; see credentials.py.

    Raises UserError on an unknown key, with the nearest known one, and on a value of the wrong type or
    out of its range.
    """
    if isinstance(raw, config_dict.ConfigDict):
        raw = raw.to_dict()
    return _convert(Config, take_keys(raw), "config")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        # What config.json would give back: JSON knows no tuples.
        return list(value) if isinstance(value, tuple) else value
    if origin is Annotated:
        converted, limit = _convert(args[0], value, where), args[1]
        if isinstance(limit, Range):
            return _in_range(converted, limit, where)
        return _duration(converted, where)
    if origin is Literal:
        if value not in args:
            raise UserError(
                f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}."
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (t for t in args if t is not types.NoneType)
        return _convert(inner, value, where)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(t, v, where) for t, v in zip(args, value, strict=True))
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            return float(value)
        raise UserError(f"{where} is {_shown(value)}; it must be a number that float32 can hold.")
    elif origin is None and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(f"{where} is {_shown(value)}; it must be of type {_name(kind)}.")


def _shown(value: Any) -> str:
    """Return the value as it would be written, cut where it would fill the terminal."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "too long a number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name(kind: Any) -> str:
    """As one would write it in Python: 'tuple[tuple[str, float], ...]'."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _name(args[0])
    if origin is None:
        return "..." if kind is Ellipsis else kind.__name__
    return f"{origin.__name__}[{', '.join(map(_name, args))}]"


def _in_range(number: int | float, allowed: Range, where: str) -> int | float:
    if allowed.least <= number <= allowed.most:
        return number
    most = "" if allowed.most == math.inf else f" and at most {allowed.most}"
    raise UserError(f"{where} is {_shown(number)}; it must be at least {allowed.least}{most}.")


def _duration(text: str, where: str) -> str:
    if _DURATION.fullmatch(text):
        return text
    raise UserError(
        f"{where}={text!r} is no duration; write for example '300 steps', '2.5 epochs' or '9e8 examples'."
    )


def _convert_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; it must be a group of keys.")
    hints = get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in hints:
            raise UserError(
                f"{where}.{key} is not a config key; {nearest_key(Config, where, key)}."
            )
    return kind(
        **{key: _convert(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    )


def parse_arg(
    arg: str, *, variants: tuple[str, ...], options: Mapping[str, type]
) -> tuple[str, dict[str, Any]]:
    """Reads what stands behind the colon of --config=file.py:base,batch=1024.

    Returns the variant (the first of `variants` if none is named) and the options that are given.
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


def steps(duration: str, *, batch_size: int, examples_per_epoch: int) -> int:
    """Return the number of steps of a `Duration`, rounded down; `MOST` stands for that many and for more."""
    match = _DURATION.fullmatch(duration)
    assert match, duration  # `parse` has looked
    amount, unit = float(match[1]), match[2]
    examples = {"step": batch_size, "epoch": examples_per_epoch, "example": 1}[unit]
    return int(min(amount * examples / batch_size + 1e-9, MOST))
