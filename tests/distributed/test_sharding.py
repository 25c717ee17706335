import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.sharding import (
    all_gather_kernel,
    matrix_spec,
    optimizer_shardings,
    parameter_shardings,
)

PARAMS = {
    "text_model": {
        "embeddings": {"embedding": jnp.zeros((7, 8))},
        "layer": {"kernel": jnp.zeros((2, 8, 12)), "bias": jnp.zeros((2, 12))},
    },
    "logit_scale": jnp.zeros(()),
}


def test_matrices_are_split_and_vectors_are_whole():
    shardings = parameter_shardings(PARAMS, make_mesh(MeshConfig(fsdp=4)))
    text = shardings["text_model"]
    assert text["embeddings"]["embedding"].spec == P(None, "fsdp")
    assert text["layer"]["kernel"].spec == P(None, None, "fsdp")
    assert text["layer"]["bias"].spec == shardings["logit_scale"].spec == P()


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((24, 1024, 4096), P(None, None, "fsdp")),  # the longer of input and output
        ((24, 4096, 1024), P(None, "fsdp", None)),
        ((24, 1024, 1024), P(None, "fsdp", None)),  # the rows of equals
        ((30522, 1024), P(None, "fsdp")),  # the shorter one, where the longer does not divide
        ((16, 16, 3, 768), P(None, None, None, "fsdp")),  # never the window of a convolution
        ((8, 30, 35), P()),  # nor the layers of a stack
        ((8,), P("fsdp")),
    ],
)
def test_a_matrix_is_split_where_it_is_long_and_divides(shape, spec):
    assert matrix_spec(shape, "fsdp", 8) == spec


def test_what_is_gathered_has_a_gradient_that_is_split():
    mesh = make_mesh(MeshConfig(fsdp=4))
    x = jnp.ones((8, 12))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(jnp.ones((12, 8)), NamedSharding(mesh, P("fsdp", None)))
        loss = jax.jit(
            jax.value_and_grad(lambda kernel: ((x @ all_gather_kernel(kernel)) ** 2).mean())
        )
        value, gradient = loss(kernel)
    assert gradient.sharding.spec == P("fsdp", None)
    assert value == 12**2
    np.testing.assert_allclose(gradient, np.full((12, 8), 2 * 12 / 8))
    assert all_gather_kernel(kernel) is kernel  # without a mesh


def test_moments_lie_as_their_parameters_before_and_after_an_update():
    mesh = make_mesh(MeshConfig(fsdp=4))
    optimizer = optax.adam(0.1)
    params = jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    shardings = optimizer_shardings(jax.eval_shape(optimizer.init, params), abstract, mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    assert state[0].mu["text_model"]["layer"]["kernel"].sharding.spec == P(None, None, "fsdp")
    assert state[0].count.sharding.spec == P()
    update = jax.jit(lambda g, s: optimizer.update(g, s)[1], out_shardings=shardings)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        after = update(params, state)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)
