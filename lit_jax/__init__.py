"""Locked-image tuning and other contrastive image-text training in JAX and Flax."""

import importlib
import logging
import sys
from typing import Any

from lit_jax import interrupts
from lit_jax.errors import import_jax_or_exit

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


# `python -m lit_jax.COMMAND` imports this package before the command's module, which would only show JAX's
# traceback. While Python looks for the module, sys.argv holds "-m".
if sys.argv[:1] == ["-m"] and any(word.startswith("lit_jax.") for word in sys.orig_argv):
    interrupts.end_at_once()
    import_jax_or_exit()
