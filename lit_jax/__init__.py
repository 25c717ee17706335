"""Locked-image tuning and other contrastive image-text training in JAX and Flax."""

import importlib
import logging
from typing import Any

__version__ = "0.2.0"

# transformers warns at import that PyTorch is missing, which lit_jax does not need.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

# Public name -> the module that defines it.
_PUBLIC = {
    "DualEncoder": "lit_jax.api",
    "TextModel": "lit_jax.api",
    "VisionModel": "lit_jax.api",
    "fit": "lit_jax.train",
    "load_run": "lit_jax.training.workdir",
}


def __getattr__(name: str) -> Any:
    # Imported on first access, so that worker processes, which decode images, do not import JAX.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lit_jax' has no attribute {name!r}")
