"""The checks before the first step of a run: keys and data that do not fit each other."""

import logging
import re
from typing import Any

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from lit_jax.config import Config, Side, loss_kinds
from lit_jax.data.example import Source
from lit_jax.data.mixture import Mixture
from lit_jax.data.text_check import check_texts, sample_captions
from lit_jax.errors import UserError
from lit_jax.models.dual_encoder import TOWERS, tower_name
from lit_jax.training.model_factory import Model, OwnTowers
from lit_jax.training.policy import Policy, is_pretrained
from lit_jax.weights.hub import OWN_TYPE
from lit_jax.weights.vision_text_dual_encoder import why_not_exportable

log = logging.getLogger(__name__)


def check_teacher(config: Config) -> None:
    """Raise UserError if keys do not fit a text teacher, or the absence of one."""
    if config.losses and config.model.teacher:
        raise UserError(
            "config.losses is for contrastive training; leave it empty with config.model.teacher."
        )
    if (config.loss == "mse") != bool(config.model.teacher):
        raise UserError(
            "config.loss='mse' and config.model.teacher belong together; set both or neither of them."
        )
    # The first letter locks the image tower. The second says whether the student starts pretrained.
    if config.model.teacher and config.policy.lock not in ("LU", "Lu"):
        raise UserError(
            f"config.policy.lock is {config.policy.lock!r}, but with config.model.teacher only the text "
            "tower trains; set it to 'LU' or 'Lu'."
        )


def check_own_towers(config: Config, towers: OwnTowers) -> None:
    """Raise UserError if passed towers do not fit the keys that name towers, or the lock."""
    if towers and (config.model.dual_encoder or config.model.teacher):
        raise UserError(
            "Towers are passed, so config.model.dual_encoder and config.model.teacher must be empty."
        )
    # TOWERS and `is_pretrained` both have the image first.
    pretrained = dict(zip(TOWERS, is_pretrained(config.policy.lock), strict=True))
    for side, (_, params) in towers.items():
        if pretrained[side] and params is None:
            raise UserError(
                f"config.policy.lock={config.policy.lock!r} needs a pretrained {side} tower; pass the tower "
                "as (module, params), or choose a lock with 'u' for it."
            )
        if not pretrained[side] and params is not None:
            raise UserError(
                f"config.policy.lock={config.policy.lock!r} draws the {side} tower at random; pass the tower "
                "without parameters, or choose a lock with 'U' or 'L' for it."
            )


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raise UserError, with the next valid size, if devices and micro-batches do not divide a batch."""
    # Each device must get equally many rows of each micro-batch.
    unit = mesh.size * accumulate
    if batch_size % unit:
        times = "" if accumulate == 1 else f" times config.accumulate={accumulate}"
        raise UserError(
            f"config.batch_size={batch_size} cannot be divided evenly among the {mesh.size} devices of the "
            f"mesh{times}; set it to a multiple of {unit}, such as {-(-batch_size // unit) * unit}."
        )


def check_accumulation(micro_batches: int, policy: Policy) -> None:
    """Raise UserError for micro-batches if a tower that trains normalises by the whole batch."""
    if micro_batches > 1 and (towers := normalized_by_batch(policy)):
        raise UserError(
            f"config.accumulate={micro_batches}, but {towers[0]} trains with batch normalisation, which "
            "needs the whole batch at once; set it to 1, or lock the tower."
        )


def normalized_by_batch(policy: Policy) -> list[str]:
    """Return the names of the towers that train with batch normalisation."""
    towers = {path.split("/")[0] for path, trains in policy.trainable.items() if trains}
    # Only BatchNorm has running statistics among its parameters.
    statistics = [path for path in policy.trainable if re.fullmatch(r".*/(mean|var)", path)]
    return sorted(towers & {path.split("/")[0] for path in statistics})


def check_logit_scale_max(maximum: float | None, policy: Policy) -> None:
    """Raise UserError if config.model.logit_scale_max limits a scale that does not train."""
    if maximum is not None and not any(
        policy.trainable.get(name) for name in ("logit_scale", "temperature")
    ):
        raise UserError(
            f"config.model.logit_scale_max={maximum:g} has no effect, because the scale of the logits does "
            "not train; set it to None."
        )


def check_locked(model: Model, side: Side, what_for: str) -> None:
    """Raise UserError, which names `what_for`, if the tower of `side` trains or there is a teacher."""
    if model.teacher is not None:
        raise UserError(
            f"{what_for} is for contrastive training; leave it out with config.model.teacher."
        )
    name = tower_name(side)
    trained = [path for path, trains in model.policy.trainable.items() if trains]
    if found := [path for path in trained if path.startswith(f"{name}/")]:
        raise UserError(
            f"{what_for} needs a locked {side} tower, but {found[0]} trains; choose a config.policy.lock "
            f"with {'L first' if side == 'image' else 'L second'}, and no rule that unlocks it."
        )


def check_captions(tokenizer: PreTrainedTokenizerBase, source: Source, teacher: Any = None) -> None:
    """Log the share of unknown tokens in the captions, for the run's tokenizer and the teacher's.

    Raises UserError if all tokens are unknown.
    """
    captions, teacher_captions = sample_captions(source)
    check_texts(tokenizer, captions, "config.data")
    if teacher is not None:
        check_texts(teacher, teacher_captions, "config.data for the teacher")


def check_negatives(config: Config, source: Source) -> None:
    """Warn if a contrastive loss has few negatives or has copies of an image among its negatives.

    Raises UserError if the run cannot learn anything.
    """
    # The loss of a student has no negatives.
    if config.loss == "mse":
        return
    if len(source) == 1:
        raise UserError(
            f"The training data ({_key(config)}) has one image, so no pair has a negative, and nothing can "
            "be learned; use data with more images."
        )
    if config.batch_size == 1 and loss_kinds(config) == {"softmax"}:
        raise UserError(
            "With config.batch_size=1 and config.loss='softmax' no pair has a negative: the loss is 0, and "
            "nothing can be learned; raise config.batch_size, or set config.loss='sigmoid'."
        )
    # A sigmoid loss still has the positive pair, which alone pulls all embeddings together.
    if config.batch_size == 1:
        log.warning(
            "With config.batch_size=1 no pair has a negative, so all embeddings become the same; raise "
            "config.batch_size."
        )
    # A batch larger than its source repeats images, and a copy of an image is not a negative for it.
    for key, size, taken in _parts(config, source):
        if taken > size:
            log.warning(
                "%s has %d images, and a batch takes %d from it (config.batch_size=%d): at least %d of them "
                "repeat another image of the batch and count as its negatives; lower config.batch_size, or "
                "use more data.",
                key,
                size,
                taken,
                config.batch_size,
                taken - size,
            )


def _key(config: Config) -> str:
    return "config.data.mixture" if config.data.mixture else "config.data.train"


def _parts(config: Config, source: Source) -> list[tuple[str, int, int]]:
    """Return the config key of each source, its number of images, and how many a batch takes from it."""
    if not isinstance(source, Mixture):
        return [(_key(config), len(source), config.batch_size)]
    # The numbers are rounded down, so that no warning is wrong.
    total = sum(source.weights.values())
    return [
        (f"{_key(config)}.{name}", len(part), int(config.batch_size * source.weights[name] / total))
        for name, part in source.parts.items()
    ]


def warn_of_export(model: Model) -> None:
    """Warn, before the training, if only lit_jax can read the model's export."""
    # Other types, such as CLIP, have classes of their own in transformers.
    is_joined = model.hf_config["model_type"] in ("vision-text-dual-encoder", OWN_TYPE)
    if is_joined and (reason := why_not_exportable(model.module)):
        log.warning(
            "Only lit_jax will be able to read an export, because transformers' VisionTextDualEncoder "
            "cannot represent this model: %s.",
            reason,
        )
