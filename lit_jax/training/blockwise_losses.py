"""The contrastive losses of `losses.py` without a similarity matrix: same values and gradients, less memory.

Each device keeps its own images and meets the texts of all devices, which travel round a ring with what they
have gathered so far. One tile of logits exists at a time, of at most TILE x TILE. The gradient of the softmax
computes the tiles once more instead of keeping them.

Each of several slices has a ring of its own; once a round, every device hands its texts to the device of the
same place in the next slice. So all devices share the slower network between slices, and have a whole round
for it: in one ring of all devices everything would go through one device of each slice.

Dims: B global batch, D embedding, b rows of one device, T tiles of them, R rows of a tile.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lit_jax.distributed.mesh import BATCH, mesh_shape, mesh_size

Embeddings = Float[Array, "B D"]
Scalar = Float[Array, ""]

# 16 MiB of float32 logits: the TPU compiler keeps them in the chip's vector memory and never writes them out.
TILE = 2048

# The smallest float32: unlike -inf, the difference of two of them is a number.
LOWEST = float(jnp.finfo(jnp.float32).min)


def lean_softmax_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    *,
    label_smoothing: float = 0.0,
    slices: int = 1,
) -> Scalar:
    """`losses.softmax_loss`; like there, a bias has no effect. `slices`: see `_meet`."""
    del logit_bias
    function = functools.partial(_softmax, label_smoothing=label_smoothing, slices=slices)
    zimg_BxD, ztxt_BxD = zimg_BxD.astype(jnp.float32), ztxt_BxD.astype(jnp.float32)
    return _differentiable(function, zimg_BxD, ztxt_BxD, logit_scale)


def lean_sigmoid_loss(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    *,
    slices: int = 1,
) -> Scalar:
    """`losses.sigmoid_loss`. `slices`: see `_meet`."""
    bias = jnp.float32(0) if logit_bias is None else logit_bias
    zimg_BxD, ztxt_BxD = zimg_BxD.astype(jnp.float32), ztxt_BxD.astype(jnp.float32)
    function = functools.partial(_sigmoid, slices=slices)
    return _differentiable(function, zimg_BxD, ztxt_BxD, logit_scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    value_and_gradients: Callable[..., tuple[Scalar, tuple]], *args: Array
) -> Scalar:
    """The value. Its gradients are found along with it, so that no tile outlives the forward pass."""
    return value_and_gradients(*args)[0]


_differentiable.defvjp(
    lambda value_and_gradients, *args: value_and_gradients(*args),
    lambda _, gradients, cotangent: tuple(cotangent * gradient for gradient in gradients),
)


def exact_dot(a_MxK: Float[Array, "M K"], b_KxN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """Return the product, at full float32 precision whatever the inputs are.

    With a scale of up to 100, the TPU's default (bfloat16 inputs) is off in the second digit of a loss.
    """
    return jnp.dot(
        a_MxK.astype(jnp.float32),
        b_KxN.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


class _Rows(NamedTuple):
    """Images or texts: B of them, or the R of a tile."""

    z: Float[Array, "R D"]
    number: Int[Array, " R"]  # that an image and its text share, from 1; 0 fills up a tile
    log_sum: Any = None  # the _LogSum of all logits of each, once it is known


class _LogSum(NamedTuple):
    """The logarithms of sums of exponentials, each as its largest exponent and the sum relative to that.

    As one number, a logarithm near 100 would lose digits with every tile that is added.
    """

    largest: Float[Array, " R"]
    relative: Float[Array, " R"]

    @classmethod
    def of(cls, logits_RxR: Float[Array, "R R"], axis: int) -> "_LogSum":
        largest = logits_RxR.max(axis, keepdims=True)
        return cls(largest.squeeze(axis), jnp.exp(logits_RxR - largest).sum(axis))

    def plus(self, other: "_LogSum") -> "_LogSum":
        largest_R = jnp.maximum(self.largest, other.largest)
        ours_R, theirs_R = (x.relative * jnp.exp(x.largest - largest_R) for x in (self, other))
        return _LogSum(largest_R, ours_R + theirs_R)

    def minus(self, logit_R: Float[Array, " R"]) -> Float[Array, " R"]:
        return jnp.log(self.relative) + (self.largest - logit_R)

    def probabilities(self, logits_RxR: Float[Array, "R R"], axis: int) -> Float[Array, "R R"]:
        """Of which this is the sum along `axis`."""
        largest, relative = (jnp.expand_dims(x, axis) for x in self)
        return jnp.exp(logits_RxR - largest) * (1 / relative)


# What images (or texts) gather on their way: a tree of _LogSum and of arrays to be added up.
_Gathered = Any


def _softmax(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    *,
    label_smoothing: float,
    slices: int,
) -> tuple[Scalar, tuple[Array, ...]]:
    """The value, and the gradients of the three arrays."""
    count, scale = len(zimg_BxD), jnp.exp(logit_scale)

    def logits_of(image: _Rows, text: _Rows) -> Float[Array, "R R"]:
        logits_RxR = scale * exact_dot(image.z, text.z.T)
        return jnp.where(_is_real(image, text), logits_RxR, LOWEST)

    def sums_of(image: _Rows, text: _Rows) -> tuple[_Gathered, _Gathered]:
        logits_RxR = logits_of(image, text)
        target_R = jnp.where(_is_pair(image, text), logits_RxR, 0.0).sum(1)
        return (_LogSum.of(logits_RxR, axis=1), target_R), _LogSum.of(logits_RxR, axis=0)

    def gradients_of(image: _Rows, text: _Rows) -> tuple[_Gathered, _Gathered]:
        logits_RxR = logits_of(image, text)
        by_image, by_text = image.log_sum, text.log_sum
        excess_RxR = by_image.probabilities(logits_RxR, 1) + by_text.probabilities(logits_RxR, 0)
        target_RxR = jnp.where(_is_pair(image, text), 1 - label_smoothing, 0.0)
        gradient_RxR = excess_RxR / 2 - (target_RxR + label_smoothing / count)
        gradient_RxR = jnp.where(_is_real(image, text), gradient_RxR, 0.0)
        return exact_dot(gradient_RxR, text.z), exact_dot(gradient_RxR.T, image.z)

    images, texts = _rows(zimg_BxD), _rows(ztxt_BxD)
    (image_sum, target_B), text_sum = _meet(sums_of, images, texts, slices)
    images, texts = images._replace(log_sum=image_sum), texts._replace(log_sum=text_sum)
    gimg_BxD, gtxt_BxD = _meet(gradients_of, images, texts, slices)
    losses_B = (image_sum.minus(target_B) + text_sum.minus(target_B)) / 2
    if label_smoothing:  # the mean of all logits is the logit of the mean image and the mean text
        mean = scale * (zimg_BxD.mean(0) * ztxt_BxD.mean(0)).sum()
        losses_B += label_smoothing * (target_B - mean)
    gimg_BxD, gtxt_BxD = gimg_BxD * (scale / count), gtxt_BxD * (scale / count)
    return losses_B.mean(), (gimg_BxD, gtxt_BxD, (zimg_BxD * gimg_BxD).sum())


def _sigmoid(
    zimg_BxD: Embeddings,
    ztxt_BxD: Embeddings,
    logit_scale: Scalar,
    logit_bias: Scalar,
    *,
    slices: int,
) -> tuple[Scalar, tuple[Array, ...]]:
    """The value, and the gradients of the four arrays."""
    count, scale = len(zimg_BxD), jnp.exp(logit_scale)

    def gradients_of(image: _Rows, text: _Rows) -> tuple[_Gathered, _Gathered]:
        logits_RxR = scale * exact_dot(image.z, text.z.T) + logit_bias
        sign_RxR = jnp.where(_is_pair(image, text), 1.0, -1.0)
        is_real_RxR = _is_real(image, text)
        losses_RxR = jnp.where(is_real_RxR, -jax.nn.log_sigmoid(sign_RxR * logits_RxR), 0.0)
        gradient_RxR = -sign_RxR * jax.nn.sigmoid(-sign_RxR * logits_RxR)
        gradient_RxR = jnp.where(is_real_RxR, gradient_RxR, 0.0)
        gimg_RxD = exact_dot(gradient_RxR, text.z)
        gtxt_RxD = exact_dot(gradient_RxR.T, image.z)
        return (gimg_RxD, losses_RxR.sum(1), gradient_RxR.sum(1)), gtxt_RxD

    images, texts = _rows(zimg_BxD), _rows(ztxt_BxD)
    (gimg_BxD, losses_B, gbias_B), gtxt_BxD = _meet(gradients_of, images, texts, slices)
    gimg_BxD, gtxt_BxD = gimg_BxD * (scale / count), gtxt_BxD * (scale / count)
    gradients = gimg_BxD, gtxt_BxD, (zimg_BxD * gimg_BxD).sum(), gbias_B.mean()
    return losses_B.mean(), gradients


def _rows(z_BxD: Embeddings) -> _Rows:
    return _Rows(z_BxD, jnp.arange(1, len(z_BxD) + 1, dtype=jnp.int32))


def _is_pair(image: _Rows, text: _Rows) -> Bool[Array, "R R"]:
    return image.number[:, None] == text.number[None, :]


def _is_real(image: _Rows, text: _Rows) -> Bool[Array, "R R"]:
    return (image.number > 0)[:, None] & (text.number > 0)[None, :]


def _meet(
    visit: Callable[[_Rows, _Rows], tuple[_Gathered, _Gathered]],
    images: _Rows,
    texts: _Rows,
    slices: int,
) -> tuple[_Gathered, _Gathered]:
    """What every image gathers from all texts, and every text from all images; leaves are B... arrays.

    `visit` says what the images and the texts of one tile gather from each other. `slices`: of equally many
    devices, into which the devices of the mesh fall in their order.
    """
    ring, rest = divmod(mesh_size(), slices)
    if rest:
        raise ValueError(f"{mesh_size()} devices are not {slices} equal slices.")
    on_device = functools.partial(_meet_on_devices, visit, slices=slices, ring=ring)
    if not mesh_shape():
        return on_device(images, texts)
    # Not checked: what is gathered starts as constants, which to the checker are the same on all devices.
    return jax.shard_map(on_device, in_specs=BATCH, out_specs=BATCH, check_vma=False)(images, texts)


def _meet_on_devices(
    visit, images: _Rows, texts: _Rows, *, slices: int, ring: int
) -> tuple[_Gathered, _Gathered]:
    """`_meet`, of this device's rows: its texts, and what they have gathered, pass all devices once."""
    rows = len(images.number)
    images, texts = _tiles(images), _tiles(texts)
    count, tile = len(texts.number), jax.tree.map(lambda x: x[0], (images, texts))
    nothing_for_image, nothing_for_text = map(_nothing, jax.eval_shape(visit, *tile))

    def meet_text(of_images: _Gathered, text: _Rows) -> tuple[_Gathered, _Gathered]:
        def meet_image(of_text: _Gathered, image: tuple[_Rows, _Gathered]) -> tuple:
            to_image, to_text = visit(image[0], text)
            return _add(of_text, to_text), _add(image[1], to_image)

        of_text, of_images = jax.lax.scan(meet_image, nothing_for_text, (images, of_images))
        return of_images, of_text

    def here(of_images: _Gathered, texts: _Rows) -> tuple[_Gathered, _Gathered]:
        return jax.lax.scan(meet_text, of_images, texts)

    nothing_for_texts = _stack(nothing_for_text, count)
    places = [divmod(device, ring) for device in range(slices * ring)]
    in_ring = [part * ring + (place - 1) % ring for part, place in places]
    between_slices = [(part - 1) % slices * ring + place for part, place in places]
    in_slice = _round(here, nothing_for_texts, in_ring, ring)
    everywhere = _round(in_slice, nothing_for_texts, between_slices, slices)
    gathered = everywhere(_stack(nothing_for_image, count), texts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], gathered)


_Meeting = Callable[[_Gathered, _Rows], tuple[_Gathered, _Gathered]]


def _round(
    meet: _Meeting, nothing_for_texts: _Gathered, receivers: list[int], stops: int
) -> _Meeting:
    """From what happens on one device (or in one slice), to a round of the texts through all `stops` of them.

    A meeting takes what this device's images have gathered, and texts; it returns the former with what these
    texts add, and what the texts gather. `receivers` says to which device each one passes them on.
    """
    if stops == 1:
        return meet
    steps = list(enumerate(receivers))

    def pass_on(tree: Any) -> Any:
        return jax.lax.ppermute(tree, BATCH[0], steps)

    def step(carry: tuple[_Rows, _Gathered, _Gathered], _: None) -> tuple[tuple, None]:
        texts, of_images, of_texts = carry
        # No transfer waits for the tiles, nor they for it: texts travel ahead of what they have gathered. The
        # last transfer of texts and the first of the other are not needed; without them there would be three
        # kinds of step to compile.
        of_texts, next_texts = pass_on(of_texts), pass_on(texts)
        of_images, to_texts = meet(of_images, texts)
        return (next_texts, of_images, _add(of_texts, to_texts)), None

    def whole(of_images: _Gathered, texts: _Rows) -> tuple[_Gathered, _Gathered]:
        start = texts, of_images, nothing_for_texts
        (_, of_images, of_texts), _ = jax.lax.scan(step, start, length=stops)
        return of_images, pass_on(of_texts)  # which are one stop short of home

    return whole


def _tiles(tree: _Rows) -> _Rows:
    """b... arrays as TxR... ones, the last tile filled up with zeros."""

    def cut(x: Array) -> Array:
        count = math.ceil(len(x) / TILE)
        size = math.ceil(len(x) / count)
        padded = jnp.pad(x, [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _stack(tree: _Gathered, count: int) -> _Gathered:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def _is_sum(node: Any) -> bool:
    return isinstance(node, _LogSum)


def _nothing(like: _Gathered) -> _Gathered:
    """What a row has gathered that has met no other."""

    def empty(node: Any) -> Any:
        if _is_sum(node):
            return _LogSum(jnp.full_like(node.largest, LOWEST), jnp.zeros_like(node.relative))
        return jnp.zeros_like(node)

    return jax.tree.map(empty, like, is_leaf=_is_sum)


def _add(a: _Gathered, b: _Gathered) -> _Gathered:
    return jax.tree.map(lambda x, y: x.plus(y) if _is_sum(x) else x + y, a, b, is_leaf=_is_sum)
