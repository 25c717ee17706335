"""Counts against those made by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.flops import matmul_flops
from lit_jax.distributed.mesh import make_mesh

X, W = jnp.ones((3, 5)), jnp.ones((5, 5))
ONE = 2 * 3 * 5 * 5  # of X @ W


def count(function, *args):
    return matmul_flops(jax.make_jaxpr(function)(*args))


def test_of_a_product_each_multiplication_and_addition_counts():
    assert count(lambda x, w: jnp.sin(x @ w), X, W) == ONE
    batched = jnp.ones((4, 3, 5))
    assert count(lambda x, w: jnp.einsum("bij,jk->bik", x, w), batched, W) == 4 * ONE
    assert count(lambda x: jnp.einsum("bij,bkj->bik", x, x), batched) == 2 * 4 * 3 * 3 * 5
    assert count(lambda x: jnp.einsum("bij,bj->bi", x, x[:, 0]), batched) == 0  # a sum
    assert count(lambda x: jnp.einsum("bij,bkj->bik", x, x[:, :1]), batched) == 2 * 4 * 3 * 5


def test_of_a_convolution_its_kernel_at_each_position():
    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 2, 9))

    def convolve(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=dims, feature_group_count=3
        )

    assert count(convolve, x, kernel) == 2 * (2 * 4 * 4 * 9) * (3 * 3 * 2)


@pytest.mark.parametrize(
    ("precision", "passes"),
    [
        (None, 1),
        (jax.lax.Precision.HIGH, 3),
        (jax.lax.Precision.HIGHEST, 6),
        (jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, 3),
    ],
)
def test_a_product_of_float32_counts_once_for_each_pass(precision, passes):
    def product(x, w):
        return jnp.dot(x, w, precision=precision)

    assert count(product, X, W) == passes * ONE
    assert count(product, X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)) == ONE


def test_of_a_choice_by_platform_the_branch_for_tpus_counts():
    def twice(x, w):
        return x @ w @ w

    def choose(x, w, **platforms):
        return jax.lax.platform_dependent(x, w, default=jnp.dot, **platforms)

    assert count(functools.partial(choose, cuda=twice), X, W) == ONE
    assert count(functools.partial(choose, cuda=jnp.dot, tpu=twice), X, W) == 2 * ONE


@pytest.mark.parametrize("cost", [None, 1234])
def test_a_kernel_counts_its_stated_cost_or_all_points_of_its_grid(cost):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    stated = cost and pl.CostEstimate(flops=cost, transcendentals=0, bytes_accessed=0)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    call = pl.pallas_call(kernel, out_shape=shape, grid=(4, 2), cost_estimate=stated)
    assert count(call, X, W) == (cost or 8 * ONE)


def test_a_scan_counts_as_often_as_it_turns():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert count(loop, X, W) == 7 * ONE
    # Each turn of the gradient's loop has two products: for x and for w.
    assert count(jax.grad(lambda w: loop(X, w).sum()), W) == (7 + 2 * 7) * ONE


@pytest.mark.parametrize(("rematerialize", "products"), [(False, 2), (True, 3)])
def test_what_is_computed_again_counts_again(rematerialize, products):
    def function(w):
        return jnp.sin(X @ w)

    of_gradient = jax.checkpoint(function) if rematerialize else function
    assert count(jax.grad(lambda w: of_gradient(w).sum()), W) == products * ONE


def test_a_constant_to_the_gradient_has_no_backward_products():
    assert count(jax.grad(lambda x: (x * (X @ W)).sum()), X) == ONE


def test_of_a_conditional_the_most_expensive_branch_counts():
    def choose(yes, x, w):
        return jax.lax.cond(yes, lambda: x @ w @ w, lambda: x)

    assert count(choose, True, X, W) == 2 * ONE


def test_a_shard_map_counts_on_all_of_its_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    x = jnp.ones((16, 5))
    for axes in ("data", ("data", "fsdp")):
        product = jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(P(axes), P()), out_specs=P(axes)
        )
        replicas = 8 // (4 if axes == "data" else 8)
        assert count(jax.jit(product), x, W) == replicas * 2 * 16 * 5 * 5


def test_a_loop_of_unknown_length_is_refused():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="unknown length"):
        count(loop, X, W)
