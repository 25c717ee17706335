"""The chip of a device is known by the name that JAX has for the device."""

import jax
import pytest

from lit_jax.distributed.chips import CHIPS, chip_of
from lit_jax.planning.topologies import open_topology


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHIPS)
def test_each_chip_is_known_by_the_name_of_its_device(name):
    topology = open_topology(f"{name}:{CHIPS[name].shapes[0]}")
    assert chip_of(topology.devices[0]) is CHIPS[name]


def test_a_cpu_has_no_published_peak():
    assert chip_of(jax.devices()[0]) is None
