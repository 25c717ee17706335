"""Locked-image tuning and other contrastive image-text training in JAX and Flax."""

import logging

__version__ = "0.1.0"

# transformers says at import that PyTorch is missing; nothing here needs it.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)
