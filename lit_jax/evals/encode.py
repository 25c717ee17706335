"""Embeddings of a whole data set, on all devices and processes, for every evaluation."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedTokenizerBase

from lit_jax.data.example import Source
from lit_jax.data.image import ImageTransform
from lit_jax.data.pipeline import eval_batches
from lit_jax.data.text import tokenize
from lit_jax.distributed.finite import check_rows
from lit_jax.distributed.mesh import REPLICATED, global_batch
from lit_jax.errors import UserError
from lit_jax.evals.cache import Arrays, EmbeddingCache, of_images, of_parts, of_side, side_params
from lit_jax.models.dual_encoder import DualEncoderModule, Side, normalize, tower_name

log = logging.getLogger(__name__)

# Embeddings that differ by less, in parts of the largest number, are the same.
SAME = 1e-6

Params = Mapping[str, Any]
Batch = Mapping[str, np.ndarray]

_SIDES: Mapping[str, Side] = {
    "encode_image": "image",
    "pool_image": "image",
    "encode_text": "text",
}
_INPUTS: Mapping[Side, tuple[str, ...]] = {
    "image": ("pixel_values",),
    "text": ("input_ids", "attention_mask", "token_type_ids"),
}


# Earlier versions kept embeddings that were not finite; what they have in a cache is not asked for.
_CACHED = "finite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Embeds images and texts with parameters that are given call by call.

    One for all evaluations of a run: images compile once, texts once for each length (the longest
    text, rounded up to a multiple of 8). All processes must make the same calls.

    Attributes:
        module: without a normalization: images get that of `image_transform`. What is cached of texts must
            not depend on it.
        batch_size: over all devices and processes; rounded up to a multiple of the devices.
        cache: gives back what was embedded before. It belongs to one set of parameters.
    """

    module: DualEncoderModule
    mesh: jax.sharding.Mesh
    image_transform: ImageTransform
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 256
    cache: EmbeddingCache | None = None

    @classmethod
    def of_setup(cls, setup: Any) -> "Encoder":
        """The encoder of a run's `training.setup.Setup`, which this room may not import."""
        return cls(
            module=setup.module.clone(normalization=None),
            mesh=setup.mesh,
            image_transform=setup.image_transform,
            tokenizer=setup.tokenizer,
        )

    @property
    def rows(self) -> int:
        """The rows of every batch: `batch_size` rounded up to a multiple of the devices."""
        return -(-self.batch_size // self.mesh.size) * self.mesh.size

    def images(
        self, params: Params, source: Source
    ) -> tuple[Float[np.ndarray, "N E"], Bool[np.ndarray, " N"]]:
        """Embed all N images of `source`; the result is the same on every process.

        Args:
            params: the merged tree of the dual encoder, placed on the mesh.

        Returns:
            Embeddings of unit length, float32, and which rows are valid: the row of an image that
            cannot be decoded is zero and not valid.

        Raises UserError if no image can be decoded, or if an embedding is not finite.
        """
        return self._images("encode_image", params, source)

    def features(
        self, params: Params, source: Source
    ) -> tuple[Float[np.ndarray, "N P"], Bool[np.ndarray, " N"]]:
        """Return what `images` does, but as the image tower has pooled it: not projected, not normalised."""
        return self._images("pool_image", params, source)

    def texts(self, params: Params, texts: Sequence[str]) -> Float[np.ndarray, "M E"]:
        """Embed M texts to unit length, float32; the result is the same on every process.

        Raises UserError if an embedding is not finite.
        """
        tokens = tokenize(self.tokenizer, texts)

        def embed() -> Arrays:
            return self._embed("encode_text", params, self._text_batches(tokens), len(texts))[:1]

        (embeds_MxE,) = self._once(
            ("encode_text", tuple(texts)), lambda: [of_side(params, "text_model"), tokens], embed
        )
        return embeds_MxE

    def _images(self, method: str, params: Params, source: Source) -> tuple[np.ndarray, np.ndarray]:
        def embed(positions: Sequence[int]) -> Arrays:
            batches = eval_batches(
                source,
                self.image_transform,
                batch_size=self.rows,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                positions=positions,
            )
            return self._embed(method, params, batches, len(positions))

        def again(found: Arrays) -> Arrays:
            """What could not be read may be there today: a disk or a store that did not answer."""
            bad = np.flatnonzero(~found[1])
            if not len(bad):
                return found
            more = embed(bad.tolist())
            if not more[1].any():
                return found
            embeds_NxE, valid_N = (array.copy() for array in found)
            embeds_NxE[bad], valid_N[bad] = more
            return embeds_NxE, valid_N

        def parts() -> list[Any]:
            side, transform = of_side(params, "vision_model"), vars(self.image_transform)
            return [method, side, transform, of_images(source)]

        embeds_NxE, valid_N = self._once(
            (method, id(source)), parts, lambda: embed(range(len(source))), again
        )
        if not valid_N.any():
            raise UserError(
                f"None of the {len(source)} images of an evaluation can be read (each warning above has a "
                "reason); fix the data, or give the path of others."
            )
        return embeds_NxE, valid_N

    def _once(
        self,
        key: Hashable,
        parts: Callable[[], list[Any]],
        embed: Callable[[], Arrays],
        again: Callable[[Arrays], Arrays] = lambda found: found,
    ) -> Arrays:
        """`parts` decide the result, together with the module."""
        if self.cache is None:
            return embed()

        def fingerprint() -> str:
            with jax.set_mesh(self.mesh):
                return of_parts(_CACHED, repr(self.module), *parts())

        return self.cache.once(key, fingerprint, embed, again)

    def _text_batches(self, tokens: Batch) -> Iterator[Batch]:
        count = len(tokens["input_ids"])
        share = self.rows // jax.process_count()
        index = np.full(-(-count // self.rows) * self.rows, -1, np.int32)
        index[:count] = np.arange(count)
        for rows in index.reshape(-1, jax.process_count(), share)[:, jax.process_index()]:
            # Padding, -1, repeats the last text: its embedding is not kept.
            yield {name: array[rows] for name, array in tokens.items()} | {"index": rows}

    def _embed(
        self, method: str, params: Params, batches: Iterable[Batch], count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        embeds_NxE, valid_N = np.zeros((count, 0), np.float32), np.zeros(count, bool)
        side = _SIDES[method]
        module = self.module.clone(normalization=self.image_transform.normalization)
        with jax.set_mesh(self.mesh):
            outputs = (_encode(params, global_batch(b, self.mesh), module, method) for b in batches)
            for z_BxE, finite_B, index_B in _fetch_one_late(outputs):
                if not embeds_NxE.size:
                    embeds_NxE = np.zeros((count, z_BxE.shape[1]), np.float32)
                real_B = index_B >= 0
                check_rows(finite_B[real_B], side, side_params(params, tower_name(side)))
                embeds_NxE[index_B[real_B]] = z_BxE[real_B]
                valid_N[index_B[real_B]] = True
        _warn_if_all_the_same(embeds_NxE[valid_N], side)
        return embeds_NxE, valid_N


def _warn_if_all_the_same(embeds_NxE: np.ndarray, side: Side) -> None:
    count = len(embeds_NxE)
    if count > 1 and np.ptp(embeds_NxE, axis=0).max() <= SAME * np.abs(embeds_NxE).max():
        log.warning(
            "The %s tower gives all %d %ss the same embedding, so that the model tells none of them apart; "
            "see whether its weights are those that you want.",
            side,
            count,
            side,
        )


# Compiled functions belong to the module, not to an Encoder: those of one module share them.
@functools.partial(jax.jit, static_argnames=("module", "method"))
def _encode(
    params: Params, batch: Mapping[str, jax.Array], module: DualEncoderModule, method: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute embeddings of unit length, or features; which of them are finite; and the index they came with.

    All are whole on every process. The index takes the same way as the rows: the devices of a mesh may
    interleave the processes.
    """
    inputs = [batch.get(name) for name in _INPUTS[_SIDES[method]]]
    rows_BxE: Any = module.apply({"params": params}, *inputs, deterministic=True, method=method)
    if method.startswith("encode"):
        rows_BxE = normalize(rows_BxE)
    rows_BxE = rows_BxE.astype(jnp.float32)
    finite_B = jnp.isfinite(rows_BxE).all(axis=1)
    return jax.lax.with_sharding_constraint((rows_BxE, finite_B, batch["index"]), REPLICATED)


def _fetch_one_late(outputs: Iterable[Any]) -> Iterator[Any]:
    """Each output as NumPy arrays, fetched when the next one has been started.

    So the devices do not wait for the host, and no more than two batches are in memory.
    """
    for output, _ in itertools.pairwise(itertools.chain(outputs, [None])):
        yield jax.device_get(output)
