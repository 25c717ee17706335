"""The tiny dual encoder and the pictures of the tests of evaluations."""

from tests.evals.conftest import encoder, params, pictures

__all__ = ["encoder", "params", "pictures"]
