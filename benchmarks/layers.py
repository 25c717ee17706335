"""The layers of a ViT-B/16, of BERT-base and of ConvNeXt-T, lit_jax against PyTorch.

    python -m benchmarks.layers [--batch=16] [--repeats=20] [--only=GELU] [--tiny]   (requirements-oracle.txt)

Method: float32, the same shapes and values; attention from the outputs of the query, key and value layers to
the input of the output layer, in PyTorch by scaled_dot_product_attention. Forward alone, compiled or in
inference mode, and with the gradient of all inputs and parameters. In turn in one process, on all cores; of
five calls in a row the last counts, so that no thread of the other framework still waits for work on a core.
Prints the median milliseconds on the clock of both and of lit_jax's plain form (lit_jax/models/ops.py), the
spread (half the distance between quartiles), and two ratios PyTorch / lit_jax: of the clock and of processor
time. Above 1 lit_jax is faster.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from benchmarks.flags import read_flags
from benchmarks.timing import in_turn
from lit_jax.distributed.flags import set_flags
from lit_jax.models.attention import attend
from lit_jax.models.layers import LayerNorm, activation
from lit_jax.models.ops import depthwise_conv


class Case(NamedTuple):
    """One layer; `shapes` are those of its arguments, the same in both frameworks."""

    name: str
    ours: Callable[..., jax.Array]
    theirs: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]


def main() -> None:
    args = read_flags(__doc__, batch=16, repeats=20, only="", tiny=False)
    set_flags()
    print(
        f"{'':26}  lit_jax ms     plain form ms    PyTorch ms      ratio  ratio of processor time"
    )
    all_cases = cases(2, (5, 3), 4, 2) if args.tiny else cases(args.batch, (197, 32), 64, 12)
    for case in all_cases:
        if args.only in case.name:
            compare(case, args.repeats)


def cases(batch: int, lengths: tuple[int, int], head: int, heads: int) -> list[Case]:
    width = head * heads
    # ConvNeXt's first map is finer and narrower than a ViT's patches.
    size = math.isqrt(4 * lengths[0])
    image, text = ((batch, length, width) for length in lengths)
    wide = (*image[:2], 4 * width)
    # The last token of a text is padding.
    ours_bias, their_bias = (
        xp.where(xp.arange(lengths[1]) < lengths[1] - 1, 0.0, -1e30)[None, None, None]
        for xp in (jnp, torch)
    )
    return [
        Case(
            f"attention of {lengths[0]}",
            functools.partial(our_attention, heads=heads, bias=None),
            functools.partial(their_attention, heads=heads, bias=None),
            (image,) * 3,
        ),
        Case(
            f"attention of {lengths[1]}, masked",
            functools.partial(our_attention, heads=heads, bias=ours_bias),
            functools.partial(their_attention, heads=heads, bias=their_bias),
            (text,) * 3,
        ),
        Case("exact GELU", activation("gelu"), functional.gelu, (wide,)),
        Case(
            "tanh GELU",
            activation("gelu_pytorch_tanh"),
            functools.partial(functional.gelu, approximate="tanh"),
            (wide,),
        ),
        Case("LayerNorm", our_norm, their_norm, (image, (width,), (width,))),
        Case(
            "depthwise convolution",
            functools.partial(depthwise_conv, stride=1, padding=(3, 3)),
            their_depthwise,
            ((batch, size, size, 8 * heads), (7, 7, 1, 8 * heads)),
        ),
        Case("dense", our_dense, their_dense, (image, (width, 4 * width), (4 * width,))),
    ]


def our_attention(q, k, v, heads, bias):
    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    return attend(split(q), split(k), split(v), bias).swapaxes(1, 2).reshape(q.shape)


def their_attention(q, k, v, heads, bias):
    def split(x):
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    context = functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=bias)
    return context.transpose(1, 2).reshape(q.shape)


def our_norm(x, scale, bias):
    return LayerNorm(1e-12).apply({"params": {"scale": scale, "bias": bias}}, x)


def their_norm(x, scale, bias):
    return functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-12)


def their_depthwise(x, kernel):
    # Channels are last here, as in lit_jax; PyTorch names them second, whatever their place in memory.
    x, kernel = x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
    return functional.conv2d(x, kernel, padding=3, groups=len(kernel)).permute(0, 2, 3, 1)


def our_dense(x, kernel, bias):
    return x @ kernel + bias[None, None]


def their_dense(x, kernel, bias):
    # PyTorch keeps the kernel the other way round; that it lies transposed in memory costs it nothing.
    return functional.linear(x, kernel.T, bias)


def compare(case: Case, repeats: int) -> None:
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in case.shapes]
    ours, theirs = case.ours, case.theirs
    cotangent = random.normal(size=ours(*map(jnp.asarray, arrays)).shape).astype(np.float32)
    ours_in, ours_out = [jnp.asarray(a) for a in arrays], jnp.asarray(cotangent)
    their_in = [torch.from_numpy(a).requires_grad_() for a in arrays]
    their_out = torch.from_numpy(cotangent)

    def gradient(out: jax.Array, *inputs: jax.Array) -> Any:
        result, pull = jax.vjp(ours, *inputs)
        return result, pull(out)

    def compiled(function: Callable[..., Any], *inputs: jax.Array) -> list[Callable[..., Any]]:
        """Return the function compiled with hand-made and with plain operations."""
        # The variable counts while JAX traces.
        programs = []
        for plain in ("0", "1"):
            os.environ["LIT_JAX_PLAIN_OPS"] = plain
            programs.append(jax.jit(lambda *args: function(*args)).lower(*inputs).compile())
        return programs

    def their_gradient() -> None:
        torch.autograd.grad(theirs(*their_in), their_in, their_out)

    for name, function, inputs, their_call in (
        (case.name, ours, ours_in, torch.inference_mode()(lambda: theirs(*their_in))),
        ("  with gradient", gradient, [ours_out, *ours_in], their_gradient),
    ):
        calls = {
            form: lambda program=program, inputs=inputs: jax.block_until_ready(program(*inputs))
            for form, program in zip(("ours", "plain"), compiled(function, *inputs), strict=True)
        }
        times = in_turn({**calls, "theirs": their_call}, repeats, uncounted=4)
        ours_t, plain_t, theirs_t = times["ours"], times["plain"], times["theirs"]
        print(
            f"{name:26} {ours_t.wall * 1e3:8.2f} ±{ours_t.spread:4.0%} "
            f"{plain_t.wall * 1e3:9.2f} ±{plain_t.spread:4.0%} "
            f"{theirs_t.wall * 1e3:9.2f} ±{theirs_t.spread:4.0%} "
            f"{theirs_t.wall / ours_t.wall:8.2f} {theirs_t.cpu / ours_t.cpu:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
