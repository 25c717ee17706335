"""The check that precomputed features come from this run's tower, preprocessing and data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lit_jax.config import DataConfig, Side
from lit_jax.credentials import hide_keys
from lit_jax.data.example import Example, Source
from lit_jax.data.files import AddressError, File, locate
from lit_jax.data.loader import Preprocessor, Processors
from lit_jax.data.text import tokenize
from lit_jax.errors import UserError
from lit_jax.files import local_path
from lit_jax.models.dual_encoder import FEATURES, DualEncoderModule
from lit_jax.precomputed.fingerprint import (
    data_fingerprint,
    fingerprint,
    sampled_examples,
    tower_fingerprint,
)
from lit_jax.precomputed.format import (
    Embeddings,
    Header,
    Pooled,
    PooledImages,
    PooledTexts,
    shard_size,
)
from lit_jax.precomputed.tower import without_towers
from lit_jax.trees import Tree

# The number of captions whose tokens are the tokenizer's fingerprint.
TOKENIZED = 256


def describe(
    module: DualEncoderModule,
    processors: Processors,
    source: Source,
    side: Side,
    views: int | None,
) -> Header:
    """Return the header of features to write or to expect; its fingerprint of the parameters, `tower`, is ''.

    Args:
        views: the number of views of each image; None means 1.
    """
    sample = sampled_examples(source)
    features = features_shape(module, side)
    return Header(
        side=side,
        # Known only once the weights are read, long after the other fields.
        tower="",
        preprocessing=_preprocessing(processors, side, sample),
        data=data_fingerprint(source, sample, side),
        views=(views or 1) if side == "image" else 0,
        examples=len(source),
        width=features.shape[1],
        dtype=features.dtype.name,
        shard_size=shard_size(len(source)),
    )


def _preprocessing(processors: Processors, side: Side, sample: list[Example]) -> str:
    """Return a fingerprint of the image transform or the tokenizer, which makes the inputs of a tower."""
    if side == "image":
        return fingerprint(dataclasses.asdict(processors.image_transform))
    # The tokens of some captions are compared, because different tokenizer files may mean the same tokenizer.
    texts = [text for example in sample for text in example["captions"]][:TOKENIZED]
    length = processors.tokenizer.model_max_length
    return fingerprint([length, tokenize(processors.tokenizer, texts, length=length)])


def features_shape(module: DualEncoderModule, side: Side) -> jax.ShapeDtypeStruct:
    """Return shape (1, width) and dtype of the features of one example, as the projection takes them."""
    batch = module.example_batch
    names = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}[side]

    def features(batch: Any) -> Any:
        params = module.init(jax.random.key(0), batch)
        return module.apply(params, *(batch[name] for name in names), method=f"{side}_features")

    # The parameters are made inside eval_shape, so that no array is allocated.
    return jax.eval_shape(features, batch)


def blank_features(module: DualEncoderModule, side: Side) -> Preprocessor:
    """Return a preprocessor that makes zeros as a tower's features, to learn the shapes of a batch."""
    return _BlankFeatures(FEATURES[side], features_shape(module, side))


@dataclasses.dataclass(frozen=True)
class _BlankFeatures(Pooled):
    shape: jax.ShapeDtypeStruct

    def sample(self, index: int, example: Example, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(self.shape.shape[1:], self.shape.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precomputed:
    """The towers whose features a run reads instead of computing them: none, one or both.

    Attributes:
        folders: the open folder of each such tower.
        inputs: the preprocessor that reads the features of each such tower.
    """

    folders: Mapping[Side, Embeddings]
    inputs: Mapping[Side, Preprocessor]

    def check_towers(self, module: DualEncoderModule, frozen: Tree) -> None:
        """Raise UserError if a folder was made with another tower than the one in `frozen`.

        All processes must call this method, under `jax.set_mesh`.
        """
        for side, embeddings in self.folders.items():
            # The parameters come last in the start of a run, so this check is apart from those of `_open`.
            if embeddings.header.tower != tower_fingerprint(module, side, frozen):
                raise _differs(side, embeddings.folder, f"another {side} tower")

    def needed(self, frozen: Tree) -> Tree:
        """Return the locked parameters that the train step still needs."""
        return without_towers(frozen, self.folders)


def embedding_folders(config: DataConfig) -> dict[Side, str]:
    """Return the folders of features that `config` names, by the side of the tower they replace."""
    folders: dict[Side, str] = {
        "image": config.image_embeddings,
        "text": config.text_embeddings,
    }
    return {side: folder for side, folder in folders.items() if folder}


def open_precomputed(
    config: DataConfig, module: DualEncoderModule, processors: Processors, source: Source
) -> Precomputed:
    """Open the folders that config.data names and check their headers, except the fingerprint of the tower.

    Nothing is opened if `source` is empty, because a finished run may go on without its data. Raises
    UserError if a folder is incomplete, or was made from other data or in another way than the config says.
    """
    opened: dict[Side, Embeddings] = {}
    for side, name in embedding_folders(config).items():
        if source:
            # The expected header needs thousands of examples, so `_open` computes it after the cheap checks.
            wanted = functools.partial(describe, module, processors, source, side, config.views)
            opened[side] = _open(config, processors, wanted, side, name)
    inputs: dict[Side, Preprocessor] = {}
    if "image" in opened:
        inputs["image"] = PooledImages(FEATURES["image"], opened["image"], config.views or 1)
    if "text" in opened:
        inputs["text"] = PooledTexts(FEATURES["text"], opened["text"])
    return Precomputed(folders=opened, inputs=inputs)


def _open(
    config: DataConfig,
    processors: Processors,
    describe_wanted: Callable[[], Header],
    side: Side,
    name: str,
) -> Embeddings:
    key = f"config.data.{side}_embeddings"
    is_address = "://" in name
    try:
        folder = _locate(key, name) if is_address else local_path(key, name)
        embeddings = Embeddings(folder)
    # There is no permission, no network, no credentials, or the address is malformed.
    except (AddressError, OSError) as error:
        to_check = "the address and the credentials" if is_address else "who may read the folder"
        raise UserError(
            f"{key}: {hide_keys(name)} cannot be read ({error}); check {to_check}."
        ) from error
    found = embeddings.header
    if found.side != side:
        raise _differs(side, folder, f"the {found.side} tower")
    if side == "image" and config.views is None and processors.image_transform.is_random:
        raise UserError(
            f"config.data.views is None, so each image is augmented anew each time; set it to {found.views} "
            f"or fewer, the views in {folder}, or train without config.data.image_embeddings."
        )
    wanted = describe_wanted()
    # The number of examples comes first: its message is clearer than that of another fingerprint.
    if found.examples != wanted.examples:
        counts = f"{found.examples} examples, but the data of this config have {wanted.examples}"
        raise _differs(side, folder, counts)
    for name, difference in _DIFFERENCES.items():
        if getattr(found, name) != getattr(wanted, name):
            raise _differs(side, folder, difference)
    # A folder with more views than the config asks for is fine; the first views are used.
    if found.views < wanted.views:
        counts = f"{found.views} views of each image, fewer than {wanted.views}"
        raise _differs(side, folder, counts)
    return embeddings


def _locate(key: str, address: str) -> File:
    try:
        return locate(address)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


# The message for each field of `Header` that must be equal.
_DIFFERENCES = {
    "data": "other data than this config's",
    "preprocessing": "another preprocessing or augmentation",
    "width": "another tower",
    "dtype": "another config.model.dtype",
}


def _differs(side: Side, folder: File, what: str) -> UserError:
    return UserError(
        f"config.data.{side}_embeddings: {folder} was made with {what}; run python -m lit_jax.embed with "
        "this config and another --output, or undo that change."
    )
