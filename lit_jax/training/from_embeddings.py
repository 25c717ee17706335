"""Training from what a locked tower has made of the data before: is it what this run's tower would make?"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from lit_jax.config import Config
from lit_jax.data.example import Example, Source
from lit_jax.data.readers import Inputs
from lit_jax.data.text import tokenize
from lit_jax.distributed.checksums import checksums
from lit_jax.errors import UserError
from lit_jax.files import local_path
from lit_jax.models.dual_encoder import POOLED, Side, tower_name
from lit_jax.precomputed.fingerprint import data_fingerprint, fingerprint, sampled_examples
from lit_jax.precomputed.format import (
    Embeddings,
    Header,
    PooledImages,
    PooledTexts,
    shard_size,
)
from lit_jax.training.model_factory import Setup
from lit_jax.trees import Tree, flatten

TOKENIZED = 256  # captions that stand for the tokenizer in its fingerprint


def check_locked(setup: Setup, side: Side, what_for: str) -> None:
    """Raises UserError unless no parameter of the tower trains; `what_for` needs it locked."""
    if setup.teacher is not None:
        raise UserError(
            f"{what_for} is for contrastive training; leave it out with config.model.teacher."
        )
    name = tower_name(side)
    trained = [path for path, yes in setup.policy.trainable.items() if yes]
    if found := [path for path in trained if path.startswith(f"{name}/")]:
        raise UserError(
            f"{what_for} needs a locked {side} tower, but {found[0]} trains; choose a config.policy.lock "
            f"with {'L first' if side == 'image' else 'L second'}, and no rule that unlocks it."
        )


def describe(config: Config, setup: Setup, source: Source, side: Side, views: int) -> Header:
    """All that is known of the embeddings of a config without the tower's parameters (`tower` is '').

    `views`: of each image.
    """
    sample = sampled_examples(source)
    pooled = setup.pooled_shape(side)
    return Header(
        side=side,
        tower="",
        preprocessing=_PREPROCESSING[side](config, setup, sample),
        data=data_fingerprint(source, sample, side),
        views=views if side == "image" else 0,
        examples=len(source),
        width=pooled.shape[1],
        dtype=pooled.dtype.name,
        shard_size=shard_size(len(source)),
    )


def _image_preprocessing(config: Config, setup: Setup, sample: list[Example]) -> str:
    return fingerprint(dataclasses.asdict(setup.image_transform))


def _text_preprocessing(config: Config, setup: Setup, sample: list[Example]) -> str:
    """Of what the tokenizer does with some captions: its files may say the same in other words."""
    texts = [text for example in sample for text in example["captions"]][:TOKENIZED]
    length = setup.tokenizer.model_max_length
    return fingerprint([length, tokenize(setup.tokenizer, texts, length=length)])


_PREPROCESSING = {"image": _image_preprocessing, "text": _text_preprocessing}


def tower_fingerprint(setup: Setup, side: Side, params: Tree) -> str:
    """Of the tower's config and parameters; `params` has them on the mesh of `jax.set_mesh`, in the dtype of
    the computation.

    All processes must call it.
    """
    tower = getattr(setup.module, tower_name(side))
    of_text = setup.module.text_first_token if side == "text" else None
    about = f"{tower.config} {tower.pooling} {np.dtype(tower.dtype)} {of_text}"
    leaves = flatten(params[tower_name(side)])
    sums = jax.device_get(checksums(leaves))
    return fingerprint(
        [about, {path: [f"{leaves[path].shape} {leaves[path].dtype}", sums[path]] for path in sums}]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """The towers whose outputs a run reads instead of computing them: none, one or both."""

    folders: Mapping[Side, Embeddings]
    inputs: Mapping[Side, Inputs]

    def check_towers(self, setup: Setup, frozen: Tree) -> None:
        """Raises UserError if a folder was made with another tower than that in `frozen`."""
        for side, embeddings in self.folders.items():
            if embeddings.header.tower != tower_fingerprint(setup, side, frozen):
                raise _differs(side, embeddings.folder, f"another {side} tower")

    def needed(self, frozen: Tree) -> Tree:
        """The locked parameters that the train step still needs."""
        return without_towers(frozen, self.folders)


def without_towers(params: Tree, sides: Iterable[Side]) -> Tree:
    absent = {tower_name(side) for side in sides}
    return {name: part for name, part in params.items() if name not in absent}


def embedding_folders(config: Config) -> dict[Side, str]:
    """Of the towers that are embedded in the run of a config."""
    data = config.data
    folders: dict[Side, str] = {"image": data.image_embeddings, "text": data.text_embeddings}
    return {side: folder for side, folder in folders.items() if folder}


def open_embedded(config: Config, setup: Setup, source: Source) -> Embedded:
    """Open the folders that config.data names, and check all but the tower's parameters; none without data.

    Raises UserError if one is not complete, or was made of other data or in another way than the config says.
    """
    opened: dict[Side, Embeddings] = {
        side: _open(
            config, setup, source, side, local_path(f"config.data.{side}_embeddings", folder)
        )
        for side, folder in embedding_folders(config).items()
        if source
    }
    inputs: dict[Side, Inputs] = {}
    if "image" in opened:
        inputs["image"] = PooledImages(POOLED["image"], opened["image"], config.data.views or 1)
    if "text" in opened:
        inputs["text"] = PooledTexts(POOLED["text"], opened["text"])
    return Embedded(folders=opened, inputs=inputs)


def _open(config: Config, setup: Setup, source: Source, side: Side, folder: Path) -> Embeddings:
    embeddings = Embeddings(folder)
    found = embeddings.header
    if found.side != side:
        raise _differs(side, folder, f"the {found.side} tower")
    if side == "image" and config.data.views is None and setup.image_transform.is_random:
        raise UserError(
            f"config.data.views is None, so each image is augmented anew each time; set it to {found.views} "
            f"or fewer, the views in {folder}, or train without config.data.image_embeddings."
        )
    wanted = describe(config, setup, source, side, config.data.views or 1)
    if found.examples != wanted.examples:
        raise _differs(
            side,
            folder,
            f"{found.examples} examples, where this config's data are {wanted.examples}",
        )
    for name, what in _DIFFERENCES.items():
        if getattr(found, name) != getattr(wanted, name):
            raise _differs(side, folder, what)
    if found.views < wanted.views:
        raise _differs(
            side, folder, f"{found.views} views of each image, fewer than {wanted.views}"
        )
    return embeddings


# By the field of `Header`.
_DIFFERENCES = {
    "data": "other data than this config's",
    "preprocessing": "another preprocessing or augmentation",
    "width": "another tower",
    "dtype": "another config.model.dtype",
}


def _differs(side: Side, folder: Path, what: str) -> UserError:
    return UserError(
        f"config.data.{side}_embeddings: {folder} was made with {what}; run python -m lit_jax.embed with "
        "this config and another --output, or take back what has changed."
    )
