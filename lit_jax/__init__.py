"""Locked-image tuning and other contrastive image-text training in JAX and Flax."""

import importlib
import logging
from typing import Any

__version__ = "0.2.0"

# transformers says at import that PyTorch is missing; nothing here needs it.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

_PUBLIC = {
    "DualEncoder": "lit_jax.api",
    "TextModel": "lit_jax.api",
    "VisionModel": "lit_jax.api",
    "fit": "lit_jax.train",
    "load_run": "lit_jax.training.workdir",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the processes that decode images should not have to import JAX.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lit_jax' has no attribute {name!r}")
