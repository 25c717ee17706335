"""The contrastive losses of `losses.py` without a similarity matrix: same values and gradients, less memory.

Each device keeps its images and computes the blocks of logits with the texts of every device. The texts
travel round a ring of the devices, together with a carry that sums the contributions of the blocks. One tile
of logits, of at most TILE x TILE, exists at a time. The gradient of the softmax recomputes the tiles instead
of keeping them.

With several slices, each slice has its own ring. Once a round, every device sends its texts to the device at
the same place in the next slice. So all devices share the slower network between slices, and each transfer
has the time of a whole round. In a single ring, all traffic would pass one device of each slice.

Dims: B global batch, D embedding, b rows of one device, T tiles of them, R rows of a tile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lit_jax.distributed.mesh import BATCH, device_kind, has_bfloat16_units, mesh_shape, mesh_size
from lit_jax.training.log_sums import LOWEST, LogSum, Normaliser, add_sums, initial_sums

Embeddings = Float[Array, "B D"]
Scalar = Float[Array, ""]

# 16 MiB of float32 logits: the TPU compiler keeps them in the chip's vector memory and never writes them out.
TILE = 2048


def blockwise_softmax_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    *,
    label_smoothing: float = 0.0,
    slices: int = 1,
) -> Scalar:
    """Compute `losses.softmax_loss` block by block. `slices`: see `_ring`."""
    # Softmax ignores a bias that all logits share.
    del logit_bias
    function = functools.partial(_softmax, label_smoothing=label_smoothing, slices=slices)
    zimg_BxD, ztxt_BxD = zimg_BxD.astype(jnp.float32), ztxt_BxD.astype(jnp.float32)
    return _differentiable(function, zimg_BxD, ztxt_BxD, logit_scale)


def blockwise_sigmoid_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    *,
    slices: int = 1,
) -> Scalar:
    """Compute `losses.sigmoid_loss` block by block. `slices`: see `_ring`."""
    bias = jnp.float32(0) if logit_bias is None else logit_bias
    zimg_BxD, ztxt_BxD = zimg_BxD.astype(jnp.float32), ztxt_BxD.astype(jnp.float32)
    function = functools.partial(_sigmoid, slices=slices)
    return _differentiable(function, zimg_BxD, ztxt_BxD, logit_scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    value_and_gradients: Callable[..., tuple[Scalar, tuple]], *args: Array
) -> Scalar:
    """Return the value. The forward pass also computes the gradients, so that no tile outlives it."""
    return value_and_gradients(*args)[0]


_differentiable.defvjp(
    # The residuals are the gradients themselves. The backward pass only scales them by the cotangent.
    lambda value_and_gradients, *args: value_and_gradients(*args),
    lambda _, gradients, cotangent: tuple(cotangent * gradient for gradient in gradients),
)


def exact_dot(a_MxK: Float[Array, "M K"], b_KxN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """Return the matrix product in float32, in three bfloat16 passes on TPU and on GPUs of the mesh.

    CPUs multiply in plain float32, and so do GPUs older than Ampere.
    """
    # With a scale of up to 100, one pass (the TPU's default) changes the second digit of a loss. Six passes
    # (HIGHEST) take twice as long as three. Three leave an error of 4e-6 in a gradient at scale 14.
    on_tpu = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGH)
    # HIGH would be one pass of TF32 on GPU. On TPU, libtpu 0.0.42.1 loses the name of this algorithm in a
    # loop, and computes one pass. CPUs and older GPUs refuse it.
    three_passes = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    on_gpu = functools.partial(
        jnp.dot, precision=three_passes if has_bfloat16_units() else jax.lax.Precision.HIGHEST
    )
    a_MxK, b_KxN = a_MxK.astype(jnp.float32), b_KxN.astype(jnp.float32)
    return jax.lax.platform_dependent(a_MxK, b_KxN, cuda=on_gpu, rocm=on_gpu, default=on_tpu)


class _Rows(NamedTuple):
    """The rows of images or texts: the B of the batch, or the R of a tile.

    Attributes:
        z: the embeddings.
        number: the number of the pair, from 1, which an image shares with its text. Padding rows have 0.
        is_real: is false for padding rows; None without padding.
        normaliser: that of all logits of each row, once their sums are known.
    """

    z: Float[Array, "R D"]
    number: Int[Array, " R"]
    is_real: Bool[Array, " R"] | None = None
    normaliser: Normaliser | None = None


# The tiles of images, or of texts, in one iteration of their loop. Arrays have a leading axis of iterations.
_Tiles = tuple[_Rows, ...]

# The sums over the blocks that a row of images or texts has been part of so far: a tree of LogSum and arrays.
_Carry = Any

# The contributions of an iteration to the carry of each tile of images, and to that of each tile of texts.
_Contributions = tuple[Sequence[Sequence[_Carry]], Sequence[Sequence[_Carry]]]
_BlockFunction = Callable[[_Tiles, _Tiles], _Contributions]


def _of_pairs(pair_fn: Callable[[_Rows, _Rows], tuple[_Carry, _Carry]]) -> _BlockFunction:
    """Return the function of an iteration whose pairs of an image and a text tile contribute one by one."""

    def block_fn(images: _Tiles, texts: _Tiles) -> _Contributions:
        pairs = [[pair_fn(image, text) for text in texts] for image in images]
        to_images = [[to_image for to_image, _ in row] for row in pairs]
        return to_images, [
            [to_text for _, to_text in column] for column in zip(*pairs, strict=True)
        ]

    return block_fn


def _softmax(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    *,
    label_smoothing: float,
    slices: int,
) -> tuple[Scalar, tuple[Array, ...]]:
    """Return the value and the gradients of both embeddings and the scale."""
    count, scale = len(zimg_BxD), jnp.exp(logit_scale)

    def logits_of(image: _Rows, text: _Rows) -> Float[Array, "R R"]:
        logits_RxR = scale * exact_dot(image.z, text.z.T)
        # The exponential of LOWEST is 0, so padding adds nothing to a sum.
        return _where_real(image, text, logits_RxR, LOWEST)

    def sums_of(images: _Tiles, texts: _Tiles) -> _Contributions:
        logits = [[logits_of(image, text) for text in texts] for image in images]
        targets = (
            sum(
                jnp.where(_is_pair(image, text), logits_RxR, 0.0).sum(1)
                for text, logits_RxR in zip(texts, row, strict=True)
            )
            for image, row in zip(images, logits, strict=True)
        )
        by_image = (LogSum.over_axis(row, axis=1) for row in logits)
        by_text = (LogSum.over_axis(column, axis=0) for column in zip(*logits, strict=True))
        to_images = [[contribution] for contribution in zip(by_image, targets, strict=True)]
        return to_images, [[contribution] for contribution in by_text]

    def gradients_of(image: _Rows, text: _Rows) -> tuple[_Carry, _Carry]:
        logits_RxR = logits_of(image, text)
        by_image, by_text = image.normaliser, text.normaliser
        assert by_image is not None
        assert by_text is not None
        excess_RxR = by_image.probabilities(logits_RxR, 1) + by_text.probabilities(logits_RxR, 0)
        target_RxR = jnp.where(_is_pair(image, text), 1 - label_smoothing, 0.0)
        # Both cross entropies have the gradient probability - target; the loss is their mean.
        gradient_RxR = excess_RxR / 2 - (target_RxR + label_smoothing / count)
        gradient_RxR = _where_real(image, text, gradient_RxR, 0.0)
        return exact_dot(gradient_RxR, text.z), exact_dot(gradient_RxR.T, image.z)

    # The first ring computes the normalisers of all rows. The second ring needs them for every gradient.
    images, texts = _rows(zimg_BxD), _rows(ztxt_BxD)
    (image_sum, target_B), text_sum = _ring(sums_of, images, texts, slices)
    images = images._replace(normaliser=image_sum.normaliser())
    texts = texts._replace(normaliser=text_sum.normaliser())
    gimg_BxD, gtxt_BxD = _ring(_of_pairs(gradients_of), images, texts, slices)
    losses_B = (image_sum.minus(target_B) + text_sum.minus(target_B)) / 2
    if label_smoothing:
        # The mean of all logits is the logit of the mean image and the mean text, by linearity.
        mean = scale * (zimg_BxD.mean(0) * ztxt_BxD.mean(0)).sum()
        losses_B += label_smoothing * (target_B - mean)
    gimg_BxD, gtxt_BxD = gimg_BxD * (scale / count), gtxt_BxD * (scale / count)
    # Each logit is proportional to the scale, so its derivative by the logarithm of the scale is the logit
    # itself, and the sum over all logits is zimg . gimg.
    return losses_B.mean(), (gimg_BxD, gtxt_BxD, (zimg_BxD * gimg_BxD).sum())


def _sigmoid(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar,
    *,
    slices: int,
) -> tuple[Scalar, tuple[Array, ...]]:
    """Return the value and the gradients of both embeddings, the scale and the bias."""
    # The loss of a pair depends on its own logit alone, so one ring computes values and gradients.
    count, scale = len(zimg_BxD), jnp.exp(logit_scale)

    def gradients_of(image: _Rows, text: _Rows) -> tuple[_Carry, _Carry]:
        logits_RxR = scale * exact_dot(image.z, text.z.T) + logit_bias
        sign_RxR = jnp.where(_is_pair(image, text), 1.0, -1.0)
        losses_RxR = _where_real(image, text, -jax.nn.log_sigmoid(sign_RxR * logits_RxR), 0.0)
        gradient_RxR = -sign_RxR * jax.nn.sigmoid(-sign_RxR * logits_RxR)
        gradient_RxR = _where_real(image, text, gradient_RxR, 0.0)
        gimg_RxD = exact_dot(gradient_RxR, text.z)
        gtxt_RxD = exact_dot(gradient_RxR.T, image.z)
        return (gimg_RxD, losses_RxR.sum(1), gradient_RxR.sum(1)), gtxt_RxD

    images, texts = _rows(zimg_BxD), _rows(ztxt_BxD)
    (gimg_BxD, losses_B, gbias_B), gtxt_BxD = _ring(_of_pairs(gradients_of), images, texts, slices)
    gimg_BxD, gtxt_BxD = gimg_BxD * (scale / count), gtxt_BxD * (scale / count)
    # The scale's gradient as in `_softmax`: a bias on the logits does not change their derivative by it.
    gradients = gimg_BxD, gtxt_BxD, (zimg_BxD * gimg_BxD).sum(), gbias_B.mean()
    return losses_B.mean(), gradients


def _rows(z_BxD: Embeddings) -> _Rows:
    return _Rows(z_BxD, jnp.arange(1, len(z_BxD) + 1, dtype=jnp.int32))


def _is_pair(image: _Rows, text: _Rows) -> Bool[Array, "R R"]:
    return image.number[:, None] == text.number[None, :]


def _where_real(
    image: _Rows, text: _Rows, x_RxR: Float[Array, "R R"], otherwise: float
) -> Float[Array, "R R"]:
    """Return the numbers of a tile with `otherwise` for padding rows, which images and texts both have."""
    if image.is_real is None or text.is_real is None:
        return x_RxR
    return jnp.where(image.is_real[:, None] & text.is_real[None, :], x_RxR, otherwise)


def _ring(
    block_fn: _BlockFunction, images: _Rows, texts: _Rows, slices: int
) -> tuple[_Carry, _Carry]:
    """Return the carry of every image over all texts, and of every text over all images; leaves are B....

    Args:
        block_fn: returns the contributions of the tiles of an iteration to each other's carries.
        slices: the number of slices of the mesh. Slices are equally large and follow each other in the order
            of the devices.
    """
    ring, rest = divmod(mesh_size(), slices)
    if rest:
        raise ValueError(f"{mesh_size()} devices are not {slices} equal slices.")
    on_device = functools.partial(_ring_on_device, block_fn, slices=slices, ring=ring)
    # Without a mesh there is one device, and no collective.
    if not mesh_shape():
        return on_device(images, texts)
    # check_vma is off, because the carry starts as constants, which the check takes for replicated values.
    return jax.shard_map(on_device, in_specs=BATCH, out_specs=BATCH, check_vma=False)(images, texts)


def _ring_on_device(
    block_fn: _BlockFunction,
    images: _Rows,
    texts: _Rows,
    *,
    slices: int,
    ring: int,
) -> tuple[_Carry, _Carry]:
    """Compute `_ring` for this device's rows, whose texts visit all devices once with their carry."""
    rows = len(images.number)
    image_tiles, text_tiles = _tiles(images), _tiles(texts)
    iterations = len(text_tiles[0].number)
    first_tiles = jax.tree.map(lambda x: x[0], (image_tiles, text_tiles))
    initial_image, initial_text = (
        tuple(initial_sums(of_tile[0]) for of_tile in contributions)
        for contributions in jax.eval_shape(block_fn, *first_tiles)
    )

    def text_iteration(image_carry: _Carry, texts: _Tiles) -> tuple[_Carry, _Carry]:
        def image_iteration(text_carry: _Carry, image: tuple[_Tiles, _Carry]) -> tuple:
            images, image_carry = image
            to_images, to_texts = block_fn(images, texts)
            return (
                _add_each(add_sums, text_carry, to_texts),
                _add_each(_add_in_order, image_carry, to_images),
            )

        text_carry, image_carry = jax.lax.scan(
            image_iteration, initial_text, (image_tiles, image_carry)
        )
        return image_carry, text_carry

    def local_step(image_carry: _Carry, texts: _Tiles) -> tuple[_Carry, _Carry]:
        return jax.lax.scan(text_iteration, image_carry, texts)

    # The barrier hides from the compiler that these are constants. It would otherwise select between them and
    # the carry in each step of the ring.
    initial_texts = jax.lax.optimization_barrier(_stack(initial_text, iterations))
    # Receivers are given for all devices of the mesh: in_ring stays in the slice, between_slices keeps the
    # place.
    places = [divmod(device, ring) for device in range(slices * ring)]
    in_ring = [part * ring + (place - 1) % ring for part, place in places]
    between_slices = [(part - 1) % slices * ring + place for part, place in places]
    over_slice = _ring_of(local_step, initial_texts, in_ring, ring)
    over_slices = _ring_of(over_slice, initial_texts, between_slices, slices)
    carries = over_slices(_stack(initial_image, iterations), text_tiles)
    of_images, of_texts = (_whole(carry, rows) for carry in carries)
    return of_images, of_texts


def _add_each(
    add: Callable[[_Carry, _Carry], _Carry], carries: _Carry, to_tiles: Sequence[Sequence[_Carry]]
) -> _Carry:
    """Return the carry of each tile of an iteration with its contributions added one after another."""
    pairs = zip(carries, to_tiles, strict=True)
    return tuple(functools.reduce(add, to_tile, carry) for carry, to_tile in pairs)


def _add_in_order(a: _Carry, b: _Carry) -> _Carry:
    # Behind a barrier, each product is added to the sum as it is computed. The TPU compiler would otherwise
    # add three arrays at once, which takes longer than the product.
    return jax.lax.optimization_barrier(add_sums(a, b))


def _tiles_per_iteration() -> int:
    """Return the number of tiles of images, and of texts, in one iteration of their loops."""
    # With four tiles of logits in a program, the TPU compiler fuses the sums of one tile with the product of
    # another, and needs fewer cycles by its own estimate. CPUs have no such gain.
    return 2 if device_kind().startswith("TPU") else 1


# (carry of this device's images, tiles of texts) -> (that carry, carry of the texts).
_RingStep = Callable[[_Carry, _Tiles], tuple[_Carry, _Carry]]


def _ring_of(
    step_fn: _RingStep, initial_texts: _Carry, receivers: list[int], stops: int
) -> _RingStep:
    """Return the step of a whole ring of `stops` devices (or slices), made from the step of one stop.

    A step takes the carry of this device's images, and texts, and returns the carry with the contributions of
    these texts, and the carry of the texts. `receivers` has the device to which each device sends its texts.
    """
    if stops == 1:
        return step_fn
    steps = list(enumerate(receivers))

    def pass_on(tree: Any) -> Any:
        return jax.lax.ppermute(tree, BATCH[0], steps)

    def step(carry: tuple[_Tiles, _Carry, _Carry], _: None) -> tuple[tuple, None]:
        texts, image_carry, text_carry = carry
        # The texts travel one step ahead of their carry, so that no transfer waits for tiles and no tile
        # waits for a transfer. The last transfer of texts and the first of the carry are superfluous; without
        # them there would be three kinds of step to compile.
        text_carry, next_texts = pass_on(text_carry), pass_on(texts)
        image_carry, to_texts = step_fn(image_carry, texts)
        return (next_texts, image_carry, add_sums(text_carry, to_texts)), None

    def ring(image_carry: _Carry, texts: _Tiles) -> tuple[_Carry, _Carry]:
        start = texts, image_carry, initial_texts
        (_, image_carry, text_carry), _ = jax.lax.scan(step, start, length=stops)
        # The carry of the texts is one stop away from the device that owns the texts.
        return image_carry, pass_on(text_carry)

    return ring


def _tiles(tree: _Rows) -> _Tiles:
    """Return arrays b... as TxR... for each tile of an iteration; zeros fill up the last tiles."""
    # Each tile of an iteration has separate arrays. In a common array, the TPU compiler would copy the sums
    # of all tiles into a third array in each step of the ring.
    rows, per_iteration = len(tree.number), _tiles_per_iteration()
    # Tiles of equal size waste less than tiles of TILE rows: 2049 rows become two tiles of 1025.
    iterations = math.ceil(rows / (TILE * per_iteration))
    size = math.ceil(rows / (iterations * per_iteration))
    padding = iterations * per_iteration * size - rows
    if padding:
        tree = tree._replace(is_real=jnp.ones(rows, bool))

    def cut(x: Array, i: int) -> Array:
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(per_iteration, iterations, size, *x.shape[1:])[i]

    return tuple(jax.tree.map(functools.partial(cut, i=i), tree) for i in range(per_iteration))


def _whole(tiles: _Carry, rows: int) -> _Carry:
    """Return the arrays b... that `_tiles` has cut."""
    return jax.tree.map(lambda *x: jnp.stack(x).reshape(-1, *x[0].shape[2:])[:rows], *tiles)


def _stack(tree: _Carry, count: int) -> _Carry:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)
