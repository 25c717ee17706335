"""The policy of a run: which parameters train and how fast, by ordered regex rules over their names.

A name is the keys of the tree joined by '/'. Each block has names of its own, whatever stack it is in. The
rule 'vision_model/encoder/layer/.*' also matches 'vision_model/encoder/layer_3/mlp/fc2/kernel'. In each list
of rules the first rule whose regex matches the whole name wins. The result is one `Policy`: gradient,
optimizer state, clipping and checkpoints see only the parameters that are trainable by this policy.
"""

import collections
import dataclasses
import itertools
import logging
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from lit_jax.config import PolicyConfig, Rules
from lit_jax.errors import UserError
from lit_jax.trees import BLOCK, STACK, Tree, block_paths, flatten, unflatten

log = logging.getLogger(__name__)

_LOCK_IMAGE: Rules = ((r"vision_model/.*", False), (r".*", True))
_LOCK_TEXT: Rules = ((r"text_model/.*", False), (r".*", True))
_LOCK_NOTHING: Rules = ((r".*", True),)

# The presets are those of LiT (2111.07991) section 3.2. Projections and temperature train under all of them.
# "U" and "u" differ in the initial values (pretrained or random), not in what trains.
LOCK_RULES: dict[str, Rules] = {
    "Lu": _LOCK_IMAGE,
    "LU": _LOCK_IMAGE,
    "uu": _LOCK_NOTHING,
    "Uu": _LOCK_NOTHING,
    "UU": _LOCK_NOTHING,
    "uL": _LOCK_TEXT,
    "UL": _LOCK_TEXT,
}
# With a teacher only the text tower trains, because all other parts already fit the teacher.
_ONLY_TEXT: Rules = ((r"text_model/.*", True), (r".*", False))
IMAGE_TOWER = r"vision_model/.*"
LEARNING_RATE_RULES: Rules = ((r".*", 1.0),)
WEIGHT_DECAY_RULES: Rules = (
    # Shifts and scales do not decay, nor do the running statistics of BatchNorm, which the step replaces.
    # Learned tokens decay like the tables of embeddings.
    (r"logit_(scale|bias)|temperature|.*/(bias|scale|factor|grn/weight|mean|var)", 0.0),
    (r".*", 1.0),
)


# The paths inside a tower that come before its blocks, and the paths that all blocks share. All other paths
# outside the blocks come after them. A new family keeps to these names.
_BEFORE = re.compile(r"(embeddings|pre_layrnorm)/.*")
_SHARED = re.compile(r"position_bias_table|relative_attention_bias/.*")

# An array has one multiplier for each block of a stack, and as many axes as the parameter.
Rate = float | np.ndarray


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy of each parameter, as flat dicts path -> value.

    Attributes:
        trainable: whether the parameter trains.
        learning_rate: the multiplier of the learning rate of each trainable parameter.
        weight_decay: the multiplier of the weight decay of each trainable parameter.
    """

    trainable: dict[str, bool]
    learning_rate: dict[str, Rate]
    weight_decay: dict[str, Rate]

    def split(self, params: Tree) -> tuple[dict, dict]:
        """Return the trainable and the frozen part of a tree of parameters, each a nested dict."""
        flat = flatten(params)
        parts = (
            {path: leaf for path, leaf in flat.items() if self.trainable[path] is wanted}
            for wanted in (True, False)
        )
        trainable, frozen = (unflatten(part) for part in parts)
        return trainable, frozen

    def table(self, abstract: Tree) -> str:
        """Return a table with a line for each parameter: name, shape, dtype, partition, multipliers."""
        lines = []
        for path, leaf in flatten(abstract).items():
            how = "locked"
            if self.trainable[path]:
                rate, decay = _shown(self.learning_rate[path]), _shown(self.weight_decay[path])
                how = f"lr {rate}  decay {decay}"
            spec = tuple(leaf.sharding.spec)
            name = _name_of_stack(path, leaf.shape)
            lines.append(f"{name:78} {leaf.shape!s:20} {leaf.dtype!s:9} {spec!s:27} {how}\n")
        return "".join(lines)


def _shown(rate: Rate) -> str:
    """Return a multiplier as text for the table, such as 'x1', or the range over blocks that differ."""
    if not isinstance(rate, np.ndarray):
        return f"x{rate:g}"
    return f"x{rate.min():.3g} to x{rate.max():.3g}"


def _name_of_stack(path: str, shape: tuple[int, ...]) -> str:
    """Return a path with the numbers of its blocks, as '.../layer_0-10/...', by which rules find them."""
    first, last = block_paths(path, shape)[0], block_paths(path, shape)[-1]
    if first == last:
        return first
    (number,) = BLOCK.findall(last)
    return BLOCK.sub(rf"layer_\1-{number}/", first)


def merge(trainable: Tree, frozen: Tree) -> dict:
    """Return the whole tree from the two parts that `Policy.split` returns."""
    return unflatten(flatten(trainable) | flatten(frozen))


def is_pretrained(lock: str) -> tuple[bool, bool]:
    """Return whether the image and the text tower start from pretrained weights; only 'u' starts random."""
    image, text = lock
    return image != "u", text != "u"


def resolve_policy(config: PolicyConfig, params: Tree, *, has_teacher: bool = False) -> Policy:
    """Apply the rules of `config` to `params` (arrays or shapes), whose stacks are cut as `find_cuts` says.

    With a teacher only the text tower trains.

    Raises UserError for a rule that is not a regular expression or matches nothing, and if nothing would
    train. Raises it also if a rule that does not name the projections locks one, because projections start
    from random values.
    """
    names = _names(params)
    every = [name for of_path in names.values() for name in of_path]
    trains = _trains(config, every, has_teacher)
    trained = [name for name in every if trains[name]]
    if not trained:
        raise UserError("config.policy.trainable locks every parameter; leave something to train.")
    # With a teacher the projections are those of its CLIP, and stay locked.
    for name in every:
        if "_projection/" in name and not trains[name] and not has_teacher:
            _check_projection_rule(name, config.trainable)
    rates = _apply_rules("learning_rate", config.learning_rate, LEARNING_RATE_RULES, trained)
    decays = _apply_rules("weight_decay", config.weight_decay, WEIGHT_DECAY_RULES, trained)
    factors = _layer_decay(config, every, trained)
    rates = {name: rate * factors.get(name, 1.0) for name, rate in rates.items()}
    flat = flatten(params)
    return Policy(
        {path: _only({trains[name] for name in of_path}) for path, of_path in names.items()},
        *(
            {
                path: _along_depth([values[name] for name in of_path], flat[path])
                for path, of_path in names.items()
                if trains[of_path[0]]
            }
            for values in (rates, decays)
        ),
    )


def find_cuts(
    config: PolicyConfig, params: Tree, *, has_teacher: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the blocks at which a new stack begins (`Tower.cuts`), for each tower that needs cuts.

    Each parameter of a stack is one array for all blocks, so a stack is either trainable or locked. `params`
    are the parameters of uncut towers.
    """
    names = _names(params)
    trains = _trains(config, [name for of_path in names.values() for name in of_path], has_teacher)
    cuts: dict[str, set[str]] = collections.defaultdict(set)
    for of_path in names.values():
        for before, name in itertools.pairwise(of_path):
            # A cut lies between two neighbours of which only one trains.
            if trains[before] != trains[name]:
                tower, _, block = _block(name).partition("/")
                cuts[tower].add(block)
    return {tower: tuple(sorted(blocks)) for tower, blocks in cuts.items()}


def _names(params: Tree) -> dict[str, list[str]]:
    """Return the names of each parameter, by its path: one for each block of a stack, else the path."""
    return {
        path: block_paths(path, leaf.shape) if STACK.fullmatch(path) else [path]
        for path, leaf in flatten(params).items()
    }


def _only(values: set[bool]) -> bool:
    # `find_cuts` has cut stacks so that all blocks of a stack agree; another number of values is a bug.
    (value,) = values
    return value


def _along_depth(rates: list[float], leaf: Any) -> Rate:
    # A number suits an array of any shape. Different rates need the axes of the parameter to broadcast.
    if len(set(rates)) == 1:
        return rates[0]
    return np.reshape(np.array(rates, np.float32), (-1,) + (1,) * (len(leaf.shape) - 1))


def _block(name: str) -> str:
    """Return the name of the block that a parameter is in, '' if the parameter is in no block."""
    # The downsampling layer at the start of a stage belongs to the first block of the stage.
    name = re.sub(r"(/stages_\d+)/downsampling_.*", r"\1/layer_0/", name)
    match = re.match(r".*\blayer_\d+(?=/)", name)
    return match[0] if match else ""


def _blocks_of(tower: str, names: Iterable[str]) -> list[str]:
    """Return the names of a tower's blocks from the first to the last, over all stages."""
    found = {_block(name) for name in names if name.startswith(f"{tower}/")} - {""}
    # Numbers are compared as integers, because layer_10 follows layer_9.
    return sorted(found, key=lambda block: [int(digits) for digits in re.findall(r"\d+", block)])


def _trains(config: PolicyConfig, names: list[str], has_teacher: bool) -> dict[str, bool]:
    """Return whether each parameter trains, by its name."""
    # The user's own rules come first, then unlock_last, then the preset, because the first match wins.
    preset = _ONLY_TEXT if has_teacher else LOCK_RULES[config.lock]
    return _apply_rules(
        "trainable", config.trainable, (*_unlocked(config, names, has_teacher), *preset), names
    )


def _unlocked(config: PolicyConfig, names: list[str], has_teacher: bool) -> Rules:
    """Return the rules for `config.unlock_last`, which open_clip calls unlocked groups.

    Raises UserError if no tower is locked or the tower has fewer blocks.
    """
    count = config.unlock_last
    if not count:
        return ()
    tower = {"L": "vision_model"}.get(config.lock[0]) or {"L": "text_model"}.get(config.lock[1])
    if tower is None or has_teacher:
        why = (
            "config.model.teacher is set" if has_teacher else f"config.policy.lock={config.lock!r}"
        )
        raise UserError(
            f"config.policy.unlock_last={count} unlocks blocks of a locked tower, but there is none, because "
            f"{why}; set it to 0, or lock a tower (such as config.policy.lock='LU')."
        )
    blocks = _blocks_of(tower, names)
    if count > len(blocks):
        raise UserError(
            f"config.policy.unlock_last is {count}, but {tower} has {len(blocks)} blocks; set it to at most "
            f"{len(blocks)}, or unlock the whole tower with config.policy.lock."
        )
    # A trained block changes what later parts get as input, so these train as well. They have no block: the
    # last normalisation, the pooler.
    unlocked = {*blocks[-count:], ""}
    inside = {name: name.removeprefix(f"{tower}/") for name in names if name.startswith(tower)}
    return tuple(
        (re.escape(name), True)
        for name, rest in inside.items()
        if _block(name) in unlocked and not (_BEFORE.fullmatch(rest) or _SHARED.fullmatch(rest))
    )


def _layer_decay(config: PolicyConfig, names: list[str], trained: list[str]) -> dict[str, float]:
    """Return the factors of config.policy.layer_decay by name, as in the fine-tuning of BEiT (2106.08254).

    With N blocks and decay d, the factor of block i, counted from 0, is d^(N - i). Parts before the blocks
    have d^(N + 1). Parts after the blocks and parts that blocks share have 1.
    """
    factors = {}
    for tower, decay in config.layer_decay.items():
        blocks = _blocks_of(tower, names)
        if not any(name.startswith(f"{tower}/") for name in trained) or not blocks:
            raise UserError(
                f"config.policy.layer_decay.{tower} has no effect, because {tower!r} is not a tower that "
                "trains; name vision_model or text_model, one that config.policy.lock does not lock."
            )
        number = {block: i for i, block in enumerate(blocks)}
        for name in trained:
            # `trained` has the names of both towers, and `number` the blocks of this one.
            if block := _block(name):
                factors |= {name: decay ** (len(blocks) - number[block])} if block in number else {}
            elif _BEFORE.fullmatch(name.removeprefix(f"{tower}/")):
                factors[name] = decay ** (len(blocks) + 1)
    return factors


def warn_of_full_rate(config: PolicyConfig, policy: Policy, params: Tree) -> None:
    """Warn if a pretrained image tower trains at the full rate of parts that start random.

    A high rate destroys what the tower has learned. SigLIP (2303.15343, section 4) trains such a tower at a
    tenth of the rate and without weight decay.
    """
    image = [
        name
        for path, names in _names(params).items()
        if path.startswith("vision_model/") and policy.trainable[path]
        for name in names
    ]
    # A user who has set any rate for the tower has made the choice that the warning is about.
    covered = "vision_model" in config.layer_decay or any(
        _matches(pattern, name) for pattern, _ in config.learning_rate for name in image
    )
    if image and not covered and is_pretrained(config.lock)[0]:
        log.warning(
            "config.policy.lock=%r trains the pretrained image tower at the full learning rate, which can "
            "destroy what it has learned; set config.policy.learning_rate=%r and "
            "config.policy.weight_decay=%r, or use 1.0 in the first to keep the full rate.",
            config.lock,
            ((IMAGE_TOWER, 0.1),),
            ((IMAGE_TOWER, 0.0),),
        )


def _matches(pattern: str, name: str) -> bool:
    """Return whether a rule matches a parameter; the rule may leave out the number of the block."""
    return any(re.fullmatch(pattern, form) for form in (name, BLOCK.sub("layer/", name)))


def _apply_rules(key: str, own: Rules, default: Rules, names: list[str]) -> dict[str, Any]:
    # A rule that matches nothing is a typing error. Without an error the wrong parameters would train.
    for pattern, _ in own:
        try:
            matches = any(_matches(pattern, name) for name in names)
        except re.error as error:
            raise UserError(
                f"config.policy.{key}: {pattern!r} is not a regular expression ({error}); correct it."
            ) from None
        if not matches:
            raise UserError(
                f"config.policy.{key}: {pattern!r} matches no {'' if key == 'trainable' else 'trainable '}"
                "parameter; a rule matches the whole name, such as 'text_model/embeddings/.*' or "
                "'text_model/encoder/layer_(10|11)/.*'."
            )
    rules = (*own, *default)
    return {
        name: next(value for pattern, value in rules if _matches(pattern, name)) for name in names
    }


def _check_projection_rule(name: str, rules: Rules) -> None:
    pattern = next(pattern for pattern, _ in rules if _matches(pattern, name))
    # A rule that names the projections is taken as deliberate.
    if "projection" not in pattern:
        raise UserError(
            f"config.policy.trainable: the rule {pattern!r} would lock {name}, which starts from random "
            "values; add a rule before this one that names it, with True to train it or False to lock it."
        )
