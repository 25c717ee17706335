import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lit_jax.config import MeshConfig
from lit_jax.distributed.mesh import make_mesh
from lit_jax.distributed.sharding import optimizer_shardings, parameter_shardings
from lit_jax.errors import UserError

PARAMS = {
    "text_model": {
        "embeddings": {"embedding": jnp.zeros((7, 8))},
        "layer": {"kernel": jnp.zeros((2, 8, 12)), "bias": jnp.zeros((2, 12))},
    },
    "logit_scale": jnp.zeros(()),
}


def test_matrices_are_split_by_output_and_vectors_are_whole():
    shardings = parameter_shardings(PARAMS, make_mesh(MeshConfig(fsdp=4)))
    text = shardings["text_model"]
    assert text["embeddings"]["embedding"].spec == P(None, "fsdp")
    assert text["layer"]["kernel"].spec == P(None, None, "fsdp")
    assert text["layer"]["bias"].spec == shardings["logit_scale"].spec == P()


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"text_model/layer/kernel.*config.mesh.fsdp=8"):
        parameter_shardings(PARAMS, make_mesh(MeshConfig(fsdp=8)))


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
