import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.models.patches import (
    antialiased_bicubic_matrix,
    bicubic_matrix,
    bilinear_matrix,
)

MATRICES = {
    "bicubic": bicubic_matrix,
    "bilinear": bilinear_matrix,
    "antialiased_bicubic": antialiased_bicubic_matrix,
}


@pytest.mark.parametrize("name", MATRICES)
def test_interpolation_is_torchs(goldens, name):
    resized = dict(np.load(goldens / f"{name}.npz"))
    grid = resized.pop("grid")
    for size, expected in resized.items():
        rows, columns = map(MATRICES[name], grid.shape, map(int, size.split("x")))
        np.testing.assert_allclose(rows @ grid @ columns.T, expected, rtol=0, atol=1e-6)


@given(st.sampled_from(list(MATRICES)), st.integers(1, 40), st.integers(1, 40))
def test_interpolation_keeps_constants_and_symmetry(name, size, new_size):
    matrix = MATRICES[name](size, new_size)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-5)
    if size == new_size:
        np.testing.assert_array_equal(matrix, np.eye(size))
