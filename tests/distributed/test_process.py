import pytest

from lit_jax.distributed import process
from lit_jax.errors import UserError


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("2", "", "JAX_NUM_PROCESSES set without JAX_PROCESS_ID; set all three or none"),
        ("two", "0", "JAX_PROCESS_ID=0 is no number .* JAX_NUM_PROCESSES=two; correct it"),
        ("2", "2", "JAX_PROCESS_ID=2 is no number from 0 to below JAX_NUM_PROCESSES=2"),
    ],
)
def test_mistakes_in_the_environment_are_named(monkeypatch, count, index, message):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with pytest.raises(UserError, match=message):
        process.initialize()
