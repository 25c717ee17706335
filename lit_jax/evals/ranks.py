"""Ranks of images and texts among millions, counted block by block without the whole matrix of scores."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Integer

from lit_jax.distributed.mesh import BATCH, REPLICATED

# The rows and columns of the block of scores on a device, a power of two.
BLOCK = 1024
# The rows that are on the devices at a time.
CHUNK = 1 << 17


class Ranks(NamedTuple):
    """The ranks of queries; the best rank is 1. An image without a text is not a query and has no rank."""

    of_images: Integer[np.ndarray, " I"]
    of_texts: Integer[np.ndarray, " M"]


def ranks(
    image_embeds_NxE: Float[np.ndarray, "N E"],
    text_embeds_MxE: Float[np.ndarray, "M E"],
    image_of_text_M: Integer[np.ndarray, " M"],
    mesh: Mesh,
    *,
    block: int = BLOCK,
    chunk: int = CHUNK,
) -> Ranks:
    """Compute the rank of each image's best own text, and the rank of each text's image.

    Each score, an inner product in float32, is computed once and used in both directions. All matrix products
    have the same shape, block x block (the last blocks are padded), because other shapes round differently:
    equal embeddings then get bit-equal scores and count as a tie.

    A device of the mesh holds about `chunk` / devices images, and about `chunk` texts.
    """
    block = min(block, _power_of_two(max(-(-len(image_embeds_NxE) // mesh.size), 8)))
    height = chunk_size(len(image_embeds_NxE), block * mesh.size, chunk)
    width = chunk_size(len(text_embeds_MxE), block, chunk)
    own_M = _own_scores(image_embeds_NxE, text_embeds_MxE, image_of_text_M, mesh, block, width)
    best_N = np.full(len(image_embeds_NxE), -np.inf, np.float32)
    # NaN stays NaN, and then counts as behind every other score.
    with np.errstate(invalid="ignore"):
        np.maximum.at(best_N, image_of_text_M, own_M)
    ahead_of_image_N = np.zeros(len(image_embeds_NxE), np.int64)
    ahead_of_text_M = np.zeros(len(text_embeds_MxE), np.int64)
    place = functools.partial(_place, mesh=mesh)
    for rows in _slices(len(image_embeds_NxE), height):
        index = place(_filled(height, np.arange(rows.start, rows.stop), -1), spec=BATCH)
        images = place(_filled(height, image_embeds_NxE[rows], 0), spec=BATCH)
        best = place(_filled(height, best_N[rows], 0), spec=BATCH)
        for columns in _slices(len(text_embeds_MxE), width):
            of_images, of_texts = jax.device_get(
                count_ahead(
                    images,
                    best,
                    index,
                    place(_filled(width, text_embeds_MxE[columns], 0)),
                    place(_filled(width, own_M[columns], 0)),
                    place(_filled(width, image_of_text_M[columns], -1)),
                    mesh=mesh,
                    block=block,
                )
            )
            # Accumulated on the host in int64; the rest of a chunk is padding.
            ahead_of_image_N[rows] += of_images[: rows.stop - rows.start]
            ahead_of_text_M[columns] += of_texts[: columns.stop - columns.start]
    has_text_N = np.bincount(image_of_text_M, minlength=len(image_embeds_NxE)) > 0
    return Ranks(1 + ahead_of_image_N[has_text_N], 1 + ahead_of_text_M)


def _own_scores(
    image_embeds_NxE: np.ndarray,
    text_embeds_MxE: np.ndarray,
    image_of_text_M: np.ndarray,
    mesh: Mesh,
    block: int,
    size: int,
) -> np.ndarray:
    """Compute the score of each text with its own image, as the diagonals of block x block products."""
    own_M = np.empty(len(text_embeds_MxE), np.float32)
    for rows in _slices(len(text_embeds_MxE), size):
        images = _place(_filled(size, image_embeds_NxE[image_of_text_M[rows]], 0), mesh)
        texts = _place(_filled(size, text_embeds_MxE[rows], 0), mesh)
        scores = jax.device_get(_diagonal(images, texts, mesh=mesh, block=block))
        own_M[rows] = scores[: rows.stop - rows.start]
    return own_M


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def _diagonal(images_CxE, texts_CxE, *, mesh: Mesh, block: int):
    def local(images_CxE, texts_CxE):
        # A whole block is multiplied for its diagonal: only the same product gives bit-equal scores.
        pairs = _blocks(images_CxE, block), _blocks(texts_CxE, block)
        return jax.lax.map(lambda pair: jnp.diagonal(_scores(*pair)), pairs).reshape(-1)

    # Every device computes all scores: they are too few to be worth communicating.
    return jax.shard_map(
        local, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False
    )(images_CxE, texts_CxE)


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def count_ahead(images_IxE, best_I, index_I, texts_TxE, own_T, image_of_T, *, mesh, block):
    """Count the competitors that each query does not beat, for images and for texts.

    For an image these are the texts of other images that score no less than its best own text; for a text,
    the other images that score no less than its own image. Ties and NaN count against the query. An index of
    -1 marks padding.

    Returns int32 counts for the I images and the T texts, replicated on all devices.
    """

    def local(images_IxE, best_I, index_I, texts_TxE, own_T, image_of_T):
        by_image = [_blocks(x, block) for x in (images_IxE, best_I, index_I)]
        by_text = [_blocks(x, block) for x in (texts_TxE, own_T, image_of_T)]

        def against_all_images(ahead_I, texts):
            texts_bxE, own_b, image_of_b = texts

            def against(image_block):
                images_bxE, best_b, index_b = image_block
                scores_bxb = _scores(images_bxE, texts_bxE)
                real_bxb = (index_b[:, None] >= 0) & (image_of_b[None, :] >= 0)
                other_bxb = real_bxb & (index_b[:, None] != image_of_b[None, :])
                # "Not less" instead of "greater or equal", so that NaN counts as ahead.
                count = functools.partial(jnp.sum, dtype=jnp.int32)
                return (
                    count(other_bxb & ~(scores_bxb < best_b[:, None]), axis=1),
                    count(other_bxb & ~(scores_bxb < own_b[None, :]), axis=0),
                )

            ahead_of_images, ahead_of_texts = jax.lax.map(against, tuple(by_image))
            return ahead_I + ahead_of_images.reshape(-1), ahead_of_texts.sum(0, dtype=jnp.int32)

        # Images are split over the devices and texts are not, so only counts are communicated, at the end.
        start_I = jnp.zeros(len(images_IxE), jnp.int32)
        ahead_I, ahead_T = jax.lax.scan(against_all_images, start_I, tuple(by_text))
        whole_I = jax.lax.all_gather(ahead_I, mesh.axis_names, tiled=True)
        return whole_I, jax.lax.psum(ahead_T.reshape(-1), mesh.axis_names)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(BATCH,) * 3 + (REPLICATED,) * 3,
        out_specs=REPLICATED,
        check_vma=False,
    )(images_IxE, best_I, index_I, texts_TxE, own_T, image_of_T)


def _scores(images_bxE, texts_bxE):
    # TPUs and recent GPUs would otherwise multiply float32 with fewer bits.
    return jnp.matmul(images_bxE, texts_bxE.T, precision=jax.lax.Precision.HIGHEST)


def _blocks(x, block: int):
    return x.reshape(-1, block, *x.shape[1:])


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def chunk_size(count: int, multiple: int, most: int) -> int:
    """Return the common size of chunks that cover `count` rows: about `most` at most, at least `multiple`.

    The size is rounded up to one of eight sizes between consecutive powers of two, so that data of similar
    size share a compiled program and little padding is computed.
    """
    chunks = -(-count // max(most, multiple))
    multiples = -(-count // (chunks * multiple))
    step = max(_power_of_two(multiples) // 16, 1)
    return -(-multiples // step) * step * multiple


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _filled(size: int, rows: np.ndarray, value: int) -> np.ndarray:
    filled = np.full((size, *rows.shape[1:]), value, rows.dtype)
    filled[: len(rows)] = rows
    return filled


def _place(rows: np.ndarray, mesh: Mesh, spec: PartitionSpec = REPLICATED) -> jax.Array:
    """Place `rows`, which every process holds in full, on the mesh in 32 bits."""
    rows = rows.astype(np.int32 if rows.dtype.kind == "i" else np.float32)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
