"""Compute the embeddings of a whole data set on all devices and processes, for every evaluation."""

import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedTokenizerBase

from lit_jax.data.eval_loader import eval_batches
from lit_jax.data.example import Source
from lit_jax.data.image import ImageTransform
from lit_jax.data.loader import Processors
from lit_jax.data.text import tokenize
from lit_jax.errors import UserError
from lit_jax.evals.cache import Arrays, EmbeddingCache
from lit_jax.models.dual_encoder import DualEncoderModule, Side
from lit_jax.precomputed.fingerprint import fingerprint, images_fingerprint, tree_checksums
from lit_jax.precomputed.tower import Batch, Output, run_tower, without_towers

log = logging.getLogger(__name__)

# Embeddings count as the same if they differ by less than this fraction of the largest absolute value.
SAME = 1e-6

Params = Mapping[str, Any]

# Part of the fingerprints. Raised because earlier versions also cached embeddings that were not finite.
_CACHE_FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder of images and texts, whose parameters are an argument of each call.

    All evaluations of a run share one encoder, so that images compile once, and texts once for each length
    (the length of the longest text, rounded up to a multiple of 8). All processes must make the same calls.

    Attributes:
        module: the dual encoder without a normalization, on which cached text embeddings must not depend.
            Images get the normalization of `image_transform`.
        batch_size: the rows of a batch over all devices, rounded up to a multiple of the devices.
        cache: the embeddings of earlier calls, for one set of parameters.
    """

    module: DualEncoderModule
    mesh: jax.sharding.Mesh
    image_transform: ImageTransform
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 256
    cache: EmbeddingCache | None = None

    @classmethod
    def from_processors(
        cls, module: DualEncoderModule, mesh: jax.sharding.Mesh, processors: Processors
    ) -> "Encoder":
        """Return the encoder of a model; the normalization of `module` is ignored."""
        return cls(
            module=module.clone(normalization=None),
            mesh=mesh,
            image_transform=processors.image_transform,
            tokenizer=processors.tokenizer,
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
            Embeddings of unit length, float32 (N, E), and which rows are valid, bool (N). The row of an image
            that cannot be decoded is zero and not valid.

        Raises UserError if no image can be decoded, or if an embedding is not finite.
        """
        return self._images("embeddings", params, source)

    def features(
        self, params: Params, source: Source
    ) -> tuple[Float[np.ndarray, "N P"], Bool[np.ndarray, " N"]]:
        """Return the same as `images`, but the image tower's features, neither projected nor normalised."""
        return self._images("features", params, source)

    def texts(self, params: Params, texts: Sequence[str]) -> Float[np.ndarray, "M E"]:
        """Embed M texts to unit length, float32 (M, E); the result is the same on every process.

        Raises UserError if an embedding is not finite.
        """
        # Tokenized before the cache is asked: the tokens are part of the fingerprint.
        tokens = tokenize(self.tokenizer, texts)

        def embed() -> Arrays:
            batches = self._text_batches(tokens)
            return self._embed("text", "embeddings", params, batches, len(texts))[:1]

        def parts() -> list[Any]:
            arrays = {name: [array.shape, array] for name, array in tokens.items()}
            return ["text", tree_checksums(without_towers(params, ["image"])), arrays]

        (embeds_MxE,) = self._once(("text", tuple(texts)), parts, embed)
        return embeds_MxE

    def _images(
        self, output: Output, params: Params, source: Source
    ) -> tuple[np.ndarray, np.ndarray]:
        def embed(positions: Sequence[int]) -> Arrays:
            batches = eval_batches(
                source,
                self.image_transform,
                batch_size=self.rows,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                positions=positions,
            )
            return self._embed("image", output, params, batches, len(positions))

        def again(found: Arrays) -> Arrays:
            """Retry the images that could not be read: the fault may have been in a disk or a network."""
            bad = np.flatnonzero(~found[1])
            if not len(bad):
                return found
            more = embed(bad.tolist())
            # The same object tells the cache that nothing has to be written.
            if not more[1].any():
                return found
            embeds_NxE, valid_N = (array.copy() for array in found)
            embeds_NxE[bad], valid_N[bad] = more
            return embeds_NxE, valid_N

        def parts() -> list[Any]:
            transform = dataclasses.asdict(self.image_transform)
            tower = tree_checksums(without_towers(params, ["text"]))
            return ["image", output, tower, transform, images_fingerprint(source)]

        # In memory the source's id suffices: evaluations of the same data share one source.
        embeds_NxE, valid_N = self._once(
            (output, id(source)), parts, lambda: embed(range(len(source))), again
        )
        if not valid_N.any():
            raise UserError(
                f"None of the {len(source)} images of an evaluation can be read (see the warnings above); "
                "fix the data, or set data.path of the evaluation (--data) to other data."
            )
        return embeds_NxE, valid_N

    def _once(
        self,
        key: Hashable,
        parts: Callable[[], list[Any]],
        embed: Callable[[], Arrays],
        again: Callable[[Arrays], Arrays] = lambda found: found,
    ) -> Arrays:
        """Return the result of `embed`, from the cache if possible.

        Args:
            key: the key in memory.
            parts: returns the values that, with the module, determine the result.
            embed: computes the arrays.
            again: retries the rows that cached arrays lack.
        """
        if self.cache is None:
            return embed()

        def name() -> str:
            # The checksums of the parameters are computed on the devices.
            with jax.set_mesh(self.mesh):
                return fingerprint([_CACHE_FORMAT, repr(self.module), *parts()])

        return self.cache.once(key, name, embed, again)

    def _text_batches(self, tokens: Batch) -> Iterator[Batch]:
        count = len(tokens["input_ids"])
        share = self.rows // jax.process_count()
        # Every process takes its share of each global batch, so the last batch is padded.
        index = np.full(-(-count // self.rows) * self.rows, -1, np.int32)
        index[:count] = np.arange(count)
        for rows in index.reshape(-1, jax.process_count(), share)[:, jax.process_index()]:
            # The padding -1 indexes the last text, whose repeated embedding is dropped.
            yield {name: array[rows] for name, array in tokens.items()} | {"index": rows}

    def _embed(
        self, side: Side, output: Output, params: Params, batches: Iterable[Batch], count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (count, E) of one tower in float32, and which rows were computed (count)."""
        embeds_NxE, valid_N = np.zeros((count, 0), np.float32), np.zeros(count, bool)
        # The device normalises the uint8 pixels, with the normalization of the images' own processor.
        module = self.module.clone(normalization=self.image_transform.normalization)
        for z_RxE, index_R in run_tower(
            module, params, self.mesh, batches, side=side, output=output
        ):
            # The width is known only from the first batch.
            if not embeds_NxE.size:
                embeds_NxE = np.zeros((count, z_RxE.shape[1]), np.float32)
            embeds_NxE[index_R] = z_RxE
            valid_N[index_R] = True
        _warn_if_all_the_same(embeds_NxE[valid_N], side)
        return embeds_NxE, valid_N


def _warn_if_all_the_same(embeds_NxE: np.ndarray, side: Side) -> None:
    """Warn if all embeddings are equal, as from a collapsed tower: the metrics alone would not show why."""
    count = len(embeds_NxE)
    if count > 1 and np.ptp(embeds_NxE, axis=0).max() <= SAME * np.abs(embeds_NxE).max():
        log.warning(
            "The %s tower gives all %d %ss the same embedding, so the model cannot tell them apart; check "
            "its weights.",
            side,
            count,
            side,
        )
