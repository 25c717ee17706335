"""Which parameters train, and how fast: ordered regex rules over parameter paths.

A path is the tree's keys joined by '/', such as 'vision_model/encoder/layer/mlp/fc2/kernel'. In each
list of rules the first whose regex matches the whole path wins. The result is one `Policy`: gradient,
optimizer state, clipping and checkpoints see only what it calls trainable.
"""

import dataclasses
import logging
import re
from typing import Any

from lit_jax.config import PolicyConfig, Rules
from lit_jax.errors import UserError
from lit_jax.trees import Tree, flatten, unflatten

log = logging.getLogger(__name__)

_LOCK_IMAGE: Rules = ((r"vision_model/.*", False), (r".*", True))
_LOCK_TEXT: Rules = ((r"text_model/.*", False), (r".*", True))
_LOCK_NOTHING: Rules = ((r".*", True),)

# LiT (2111.07991) section 3.2. Projections and the temperature train under every preset.
LOCK_RULES: dict[str, Rules] = {
    "Lu": _LOCK_IMAGE,
    "LU": _LOCK_IMAGE,
    "uu": _LOCK_NOTHING,
    "Uu": _LOCK_NOTHING,
    "UU": _LOCK_NOTHING,
    "uL": _LOCK_TEXT,
    "UL": _LOCK_TEXT,
}
# With a teacher: all other parts are those that the teacher was trained with.
_ONLY_TEXT: Rules = ((r"text_model/.*", True), (r".*", False))
IMAGE_TOWER = r"vision_model/.*"
LEARNING_RATE_RULES: Rules = ((r".*", 1.0),)
WEIGHT_DECAY_RULES: Rules = (
    # What shifts and scales, and the running statistics of BatchNorm, which the step itself replaces. Learned
    # tokens decay as the tables of embeddings do.
    (r"logit_(scale|bias)|temperature|.*/(bias|scale|factor|grn/weight|mean|var)", 0.0),
    (r".*", 1.0),
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Per parameter, as flat dicts path -> value: does it train, and its two multipliers if so."""

    trainable: dict[str, bool]
    learning_rate: dict[str, float]
    weight_decay: dict[str, float]

    def split(self, params: Tree) -> tuple[dict, dict]:
        """The trainable and the frozen part of a tree of parameters, each a nested dict."""
        flat = flatten(params)
        parts = (
            {path: leaf for path, leaf in flat.items() if self.trainable[path] is wanted}
            for wanted in (True, False)
        )
        trainable, frozen = (unflatten(part) for part in parts)
        return trainable, frozen

    def table(self, abstract: Tree) -> str:
        """One line a parameter: path, shape, dtype, partition, and how it trains."""
        lines = []
        for path, leaf in flatten(abstract).items():
            how = "locked"
            if self.trainable[path]:
                rates = self.learning_rate[path], self.weight_decay[path]
                how = "lr x{:g}  decay x{:g}".format(*rates)
            spec = tuple(leaf.sharding.spec)
            lines.append(f"{path:78} {leaf.shape!s:20} {leaf.dtype!s:9} {spec!s:27} {how}\n")
        return "".join(lines)


def merge(trainable: Tree, frozen: Tree) -> dict:
    """The whole tree of which `Policy.split` made two."""
    return unflatten(flatten(trainable) | flatten(frozen))


def is_pretrained(lock: str) -> tuple[bool, bool]:
    """Whether the image and the text tower start from pretrained weights: all but 'u' do."""
    image, text = lock
    return image != "u", text != "u"


def resolve_policy(config: PolicyConfig, params: Tree, *, has_teacher: bool = False) -> Policy:
    """Applies the rules of `config` to the paths of `params` (arrays, or their shapes).

    With a teacher nothing but the text tower trains.
    Raises UserError on a rule that is no regular expression or matches nothing, if nothing would train,
    and if a rule that does not name the projections locks one: a projection starts random.
    """
    paths = list(flatten(params))
    own = _ONLY_TEXT if has_teacher else LOCK_RULES[config.lock]
    trainable = _apply_rules("trainable", config.trainable, own, paths)
    trained = [path for path in paths if trainable[path]]
    if not trained:
        raise UserError("config.policy.trainable locks every parameter; leave something to train.")
    for path in paths:
        if "_projection/" in path and not trainable[path] and not has_teacher:
            _check_projection_rule(path, config.trainable)
    return Policy(
        trainable,
        _apply_rules("learning_rate", config.learning_rate, LEARNING_RATE_RULES, trained),
        _apply_rules("weight_decay", config.weight_decay, WEIGHT_DECAY_RULES, trained),
    )


def warn_of_full_rate(config: PolicyConfig, policy: Policy) -> None:
    """Say so if a pretrained image tower trains as fast as what starts random.

    A high rate destroys what the tower has learned: SigLIP (2303.15343, section 4) trains it at a tenth of
    the rate and without weight decay.
    """
    image = [path for path in policy.learning_rate if path.startswith("vision_model/")]
    covered = any(
        re.fullmatch(pattern, path) for pattern, _ in config.learning_rate for path in image
    )
    if image and not covered and is_pretrained(config.lock)[0]:
        log.warning(
            "config.policy.lock=%r trains the pretrained image tower at the full learning rate, which can "
            "destroy what it has learned; set config.policy.learning_rate=%r and "
            "config.policy.weight_decay=%r, or 1.0 in the first to keep the full rate.",
            config.lock,
            ((IMAGE_TOWER, 0.1),),
            ((IMAGE_TOWER, 0.0),),
        )


def _apply_rules(key: str, own: Rules, default: Rules, paths: list[str]) -> dict[str, Any]:
    for pattern, _ in own:
        try:
            matches = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(
                f"config.policy.{key}: {pattern!r} is not a regular expression ({error})."
            ) from None
        if not matches:
            raise UserError(
                f"config.policy.{key}: {pattern!r} matches no {'' if key == 'trainable' else 'trainable '}"
                "parameter; a rule matches the whole path, such as 'text_model/embeddings/.*'."
            )
    rules = (*own, *default)
    return {
        path: next(value for pattern, value in rules if re.fullmatch(pattern, path))
        for path in paths
    }


def _check_projection_rule(path: str, rules: Rules) -> None:
    pattern = next(pattern for pattern, _ in rules if re.fullmatch(pattern, path))
    if "projection" not in pattern:
        raise UserError(
            f"config.policy.trainable: the rule {pattern!r} would lock {path}, which starts random; "
            "put a rule with True for it in front, or one that names it with False."
        )
