"""Blockwise losses equal float64 NumPy in value and every gradient on every mesh, without a big buffer."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import portpicker
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import batch_sharding, make_mesh
from lit_jax.errors import UserError
from lit_jax.training import blockwise_losses, losses
from lit_jax.training.losses import make_loss, prefers_blockwise
from tests.training.test_losses import embeddings, numeric_gradients, reference

MESHES = [None, (1, 1), (8, 1), (4, 2), (2, 4)]
SMOOTHING = 0.1
HERE = Path(__file__).parent


def mesh_of(sizes):
    data, fsdp = sizes
    return make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])


def both(*args, implementation="blockwise", slices=1):
    """{loss: (value, gradients of the four arguments)} of both losses, in one program."""
    found = {}
    for name, smoothing in (("softmax", SMOOTHING), ("sigmoid", 0.0)):
        loss = make_loss(
            name, implementation=implementation, label_smoothing=smoothing, slices=slices
        )
        found[name] = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)
    return found


def on_mesh(sizes, function, *args):
    args = [jnp.asarray(arg) for arg in args]
    if sizes is None:
        return jax.jit(function)(*args)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        args[:2] = (jax.device_put(z_BxD, batch_sharding(mesh)) for z_BxD in args[:2])
        return jax.jit(function)(*args)


def exact(name, zimg, ztxt, scale, bias, smoothing=SMOOTHING):
    """Value and gradients by the definitions, in float64, from the whole matrix."""
    smoothing = smoothing if name == "softmax" else 0.0
    value = reference(name, zimg, ztxt, scale, bias, smoothing)
    zimg, ztxt, factor = zimg.astype(np.float64), ztxt.astype(np.float64), np.exp(float(scale))
    products, count = factor * zimg @ ztxt.T, len(zimg)
    logits = products + float(bias)
    if name == "sigmoid":
        sign = 2 * np.eye(count) - 1
        grad = -sign * np.exp(-np.logaddexp(0, sign * logits)) / count
    else:
        target = (1 - smoothing) * np.eye(count) + smoothing / count
        rows = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        columns = np.exp(logits - np.logaddexp.reduce(logits, axis=0, keepdims=True))
        grad = (rows + columns - 2 * target) / (2 * count)
    gradients = factor * grad @ ztxt, factor * grad.T @ zimg, (grad * products).sum(), grad.sum()
    return value, gradients


def assert_equal(found, args, *, rtol=3e-6):
    """The scale multiplies whatever rounding there is in a similarity, 2**-24 and a few of them."""
    for name, (value, gradients) in found.items():
        expected, expected_gradients = exact(name, *args)
        rounding = 1e-6 * np.exp(float(args[2]))
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=rounding)
        largest = max(np.abs(gradient).max() for gradient in expected_gradients)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=rtol * largest + rounding, err_msg=name)


@jax.custom_vjp
def three_passes(a_MxK, b_KxN):
    """The product as TPU and GPU compute it, of the parts of each factor that bfloat16 can hold."""
    (a, a_rest), (b, b_rest) = map(two_parts, (a_MxK, b_KxN))
    # The products of bfloat16 numbers are exact in float32; the product of both rests is left out.
    return (a @ b_rest + a_rest @ b) + a @ b


def two_parts(x):
    large = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return large, jax.lax.reduce_precision(x - large, exponent_bits=8, mantissa_bits=7)


# JAX computes the products of a gradient with the algorithm of the product itself.
three_passes.defvjp(
    lambda a, b: (three_passes(a, b), (a, b)),
    lambda factors, grad: (three_passes(grad, factors[1].T), three_passes(factors[0].T, grad)),
)


def gradient_error(name, implementation, scale):
    """||g - g64|| / ||g64|| of the images' gradient, for pairs as similar as late in training."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 512, 256))
    pairs = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, 0.35 * x + noise)]
    bias = 0 if name == "softmax" else -10
    args = (*(z.astype(np.float32) for z in pairs), np.float32(np.log(scale)), np.float32(bias))
    loss = make_loss(name, implementation=implementation)
    found = jax.jit(jax.grad(loss))(*args)
    expected = exact(name, *args, smoothing=0.0)[1][0]
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# At scale 100 the softmax's own error in float32 is between 3e-6 and 8e-3, the more the smaller its gradient.
@pytest.mark.parametrize(("scale", "bound"), [(14, 5e-6), (100, 2e-5)])
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_three_passes_are_exact_enough(name, implementation, scale, bound, monkeypatch):
    plain = gradient_error(name, implementation, scale)
    for module in (losses, blockwise_losses):
        monkeypatch.setattr(module, "exact_dot", three_passes)
    assert plain < gradient_error(name, implementation, scale) < bound


def test_products_of_the_loss_are_plain_float32_on_cpu_and_three_passes_on_tpu():
    a, b = jax.random.normal(jax.random.key(0), (2, 300, 300))
    expected = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_array_equal(blockwise_losses.exact_dot(a, b), expected)
    # GPUs need a mesh, whose devices say how new they are: tests/planning/test_gpu.py.
    for platform, precision in (("tpu", "HIGH"), ("cuda", "HIGHEST"), ("rocm", "HIGHEST")):
        form = rf"precision = \[{precision}, {precision}\]"
        program = jax.jit(jax.grad(lambda a: blockwise_losses.exact_dot(a, b).sum())).trace(a)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products, platform
        assert all(re.search(form, line) for line in products), platform


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_float64_gradients_are_those_of_the_float64_value(name):
    args = (*embeddings(5, 3), np.float32(2.0), np.float32(-1.0))
    numeric = numeric_gradients(name, args, SMOOTHING if name == "softmax" else 0.0)
    for ours, theirs in zip(exact(name, *args)[1], numeric, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


# On TPUs two tiles of each side make one turn of the loops.
KINDS = ["cpu", "TPU v5 lite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES)
def test_value_and_gradients_equal_float64_on_every_mesh(sizes, kind, monkeypatch):
    """Tiles of 2 of the 5 rows of each of 8 devices: a tile in part filled up, and several turns of tiles."""
    monkeypatch.setattr(blockwise_losses, "TILE", 2)
    monkeypatch.setattr(blockwise_losses, "device_kind", lambda: kind)
    args = (*embeddings(40, 5), np.float32(np.log(100)), np.float32(-10))
    assert_equal(on_mesh(sizes, both, *args), args)


@settings(max_examples=8)
@given(
    sizes=st.sampled_from(MESHES[2:]),
    slices=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    tile=st.integers(1, 6),
    scale=st.floats(-2, float(np.log(100))),
    bias=st.floats(-20, 5),
    seed=st.integers(0, 99),
    kind=st.sampled_from(KINDS),
)
def test_any_batch_equals_float64(sizes, slices, rows, width, tile, scale, bias, seed, kind):
    args = (*embeddings(8 * rows, width, seed), np.float32(scale), np.float32(bias))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise_losses, "TILE", tile)
        patch.setattr(blockwise_losses, "device_kind", lambda: kind)
        assert_equal(on_mesh(sizes, functools.partial(both, slices=slices), *args), args)


@pytest.mark.parametrize("slices", [2, 4, 8])
def test_slices_change_neither_value_nor_gradients(slices):
    args = (*embeddings(24, 5), np.float32(np.log(100)), np.float32(-10))
    assert_equal(on_mesh((4, 2), functools.partial(both, slices=slices), *args), args)


def test_texts_stay_in_their_slice_but_for_one_hand_over_a_round():
    """Devices 0 to 3 are one slice, 4 to 7 the other."""
    args = (*embeddings(8, 3), np.float32(2.0), np.float32(0.0))
    with jax.set_mesh(mesh_of((4, 2))):
        program = str(jax.make_jaxpr(functools.partial(both, slices=2))(*args))
    routes = {
        frozenset(re.findall(r"\((\d), (\d)\)", found))
        for found in re.findall(r"perm=\(((?:\(\d, \d\),? ?)+)\)", program)
    }
    ring = {(str(a), str(4 * (a // 4) + (a - 1) % 4)) for a in range(8)}
    between = {(str(a), str((a + 4) % 8)) for a in range(8)}
    assert routes == {frozenset(ring), frozenset(between)}


def test_slices_that_do_not_divide_the_mesh_are_an_error():
    args = (*embeddings(8, 3), np.float32(2.0), np.float32(0.0))
    with pytest.raises(ValueError, match=r"8 devices .*3 equal"):
        on_mesh((4, 2), functools.partial(both, slices=3), *args)


def test_a_perfect_match_costs_nothing_and_one_pair_has_no_negatives():
    """Where all digits cancel, none may be left over."""
    z_BxD = np.eye(4, dtype=np.float32)
    for batch in (1, 4):
        loss = make_loss("softmax", implementation="blockwise")
        gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))
        value, (gimg, gtxt, gscale) = jax.jit(gradients)(*[z_BxD[:batch]] * 2, jnp.log(100.0))
        assert float(value) == float(gscale) == 0.0
        assert float(jnp.abs(gimg).max()) == float(jnp.abs(gtxt).max()) < 1e-30


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_bfloat16_embeddings_are_off_by_no_more_than_their_rounding(implementation):
    """Rounding changes an embedding by 2**-9 of its length at most, so a logit by 2**-8 of the scale, and a
    loss by twice that (for the sigmoid: times the B logits of a row). From there on all is float32.
    """
    args = (*embeddings(16, 8), np.float32(np.log(20)), np.float32(-3))
    rounded = [z.astype(jnp.bfloat16) for z in args[:2]]
    found = jax.jit(lambda *x: both(*x, implementation=implementation))(*rounded, *args[2:])
    back = [z.astype(np.float32) for z in rounded]
    for name, (value, gradients) in found.items():
        logits = 1 if name == "softmax" else 16
        assert abs(float(value) - exact(name, *args)[0]) < 2 * 20 * 2**-8 * logits
        expected, expected_gradients = exact(name, *back, *args[2:])
        np.testing.assert_allclose(value, expected, rtol=2e-6)
        largest = max(np.abs(g).max() for g in expected_gradients)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            bound = 2**-8 * np.abs(theirs) + 1e-5 * largest  # a gradient is rounded as its array is
            assert (np.abs(np.asarray(ours, np.float64) - theirs) <= bound).all()
        assert gradients[0].dtype == jnp.bfloat16


def largest_array(implementation, sizes, args):
    """How many numbers the largest array has, on a device, of both losses and their gradients compiled."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        z_BxD = jax.ShapeDtypeStruct(*args, sharding=batch_sharding(mesh))
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        function = jax.jit(lambda *x: both(*x, implementation=implementation))
        compiled = function.lower(z_BxD, z_BxD, scalar, scalar).compile()
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("sizes", [(1, 1), (4, 2)])
def test_no_array_is_larger_than_the_embeddings_of_a_device_or_a_tile(sizes, monkeypatch):
    monkeypatch.setattr(blockwise_losses, "TILE", 32)
    batch, width, devices = 512, 32, np.prod(sizes)
    args = (batch, width), jnp.float32
    assert largest_array("dense", sizes, args) >= batch * batch / devices
    assert largest_array("blockwise", sizes, args) <= max(batch * width / devices, 32 * 32)


@pytest.mark.parametrize(
    ("batch", "sizes", "is_blockwise"),
    [
        (2047, None, False),
        (2048, None, True),
        (4096, (4, 2), False),
        (8192, (4, 2), True),
        (8191, (4, 2), False),  # does not divide
        (8192, (1, 1), True),
    ],
)
def test_the_blockwise_implementation_runs_where_a_device_has_more_than_a_tile(
    batch, sizes, is_blockwise
):
    if sizes is None:
        assert prefers_blockwise(batch) is is_blockwise
        return
    with jax.set_mesh(mesh_of(sizes)):
        assert prefers_blockwise(batch) is is_blockwise


@pytest.mark.parametrize(("implementation", "runs"), [("dense", 0), ("blockwise", 1), ("auto", 0)])
def test_the_config_chooses_the_implementation(implementation, runs, monkeypatch):
    called = []
    spy = {"softmax": lambda *args, slices: called.append(args) or jnp.float32(0)}
    monkeypatch.setattr(losses, "BLOCKWISE", spy)
    pairs = map(jnp.asarray, embeddings(4))
    make_loss("softmax", implementation=implementation)(*pairs, jnp.float32(0.0), None)
    assert len(called) == runs


def test_an_implementation_of_a_loss_without_pairs_is_refused():
    with pytest.raises(UserError, match=r"config.loss_implementation"):
        make_loss("mse", implementation="blockwise")


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(HERE.parents[1]), **variables}


@pytest.mark.long
def test_two_processes_of_four_devices_equal_float64(tmp_path):
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{portpicker.pick_unused_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    script, files = HERE / "loss_of_two_processes.py", [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [
        subprocess.Popen(
            [sys.executable, script, file], env=environment(**together, JAX_PROCESS_ID=file.stem)
        )
        for file in files
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for file in files:
        arrays = np.load(file)
        args = [arrays[f"arg{i}"] for i in range(4)]
        for name in ("softmax", "sigmoid"):
            gradients = [arrays[f"{name}_gradient{i}"] for i in range(4)]
            assert_equal({name: (arrays[name], gradients)}, args)


@pytest.mark.long
def test_a_million_pairs_fit_on_256_chips_in_three_passes():
    """By the real compiler. The similarity matrix would take 16 GiB a chip, which has no more in all."""
    process = subprocess.run(
        [sys.executable, HERE / "compile_blockwise_losses.py", "v5e:16x16", str(2**20)],
        env=environment(
            JAX_PLATFORMS="cpu",
            JAX_DISABLE_MOST_OPTIMIZATIONS="0",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        ),
        stdout=subprocess.PIPE,
        timeout=1800,
        check=True,
    )
    for name, (held, precisions) in json.loads(process.stdout).items():
        assert held < 2**28, name
        # The compiler may drop a precision that it does not like, and compute a single pass. It may also cut
        # or copy a loop over tiles, so the number of products is its own; two gradients and the logits are
        # least.
        assert len(precisions) >= 3, name
        assert all(of_product == [["high", "high"]] for of_product in precisions), name
