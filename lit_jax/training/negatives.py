"""Whether the batches of a run have negatives to learn from: pairs of other images and texts."""

import logging

from lit_jax.config import Config
from lit_jax.data.example import Source
from lit_jax.data.mixture import Mixture
from lit_jax.errors import UserError

log = logging.getLogger(__name__)


def check_negatives(config: Config, source: Source) -> None:
    """Say so if a contrastive loss has few negatives, or an image among its own.

    Raises UserError if it can learn nothing.
    """
    if config.loss == "mse":
        return
    if len(source) == 1:
        raise UserError(
            f"The training data ({_key(config)}) has one image, so that no pair has a negative and nothing "
            "can be learned; use data with more images."
        )
    if config.batch_size == 1 and config.loss == "softmax":
        raise UserError(
            "With config.batch_size=1 and config.loss='softmax' no pair has a negative: the loss is 0, and "
            "nothing can be learned; make config.batch_size larger, or set config.loss='sigmoid'."
        )
    if config.batch_size == 1:
        log.warning(
            "With config.batch_size=1 no pair has a negative, so that all embeddings become the same; "
            "make config.batch_size larger."
        )
    for key, size, drawn in _parts(config, source):
        if drawn > size:
            log.warning(
                "%s has %d images, and a batch takes %d from it (config.batch_size=%d): at least %d of them "
                "are there more than once and are their own negatives; make config.batch_size smaller, or "
                "use more data.",
                key,
                size,
                drawn,
                config.batch_size,
                drawn - size,
            )


def _key(config: Config) -> str:
    return "config.data.mixture" if config.data.mixture else "config.data.train"


def _parts(config: Config, source: Source) -> list[tuple[str, int, int]]:
    """Return the config key of each source, its number of images, and how many a batch takes from it."""
    if not isinstance(source, Mixture):
        return [(_key(config), len(source), config.batch_size)]
    total = sum(source.weights.values())
    return [
        (f"{_key(config)}.{name}", len(part), int(config.batch_size * source.weights[name] / total))
        for name, part in source.parts.items()
    ]
