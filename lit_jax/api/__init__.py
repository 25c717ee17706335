"""Dual encoders and towers as Python objects: read, embed, compare, write.

The documentation of transformers shows the same for VisionTextDualEncoderModel, CLIPModel, SiglipModel,
AlignModel and AltCLIPModel. Here it is in JAX: `module` is a linen module and `params` a tree that can be
given call by call, so that a call can be differentiated (in reverse), vmapped, compiled and sharded as any
function of JAX.
"""

from lit_jax.api.dual_encoder import DualEncoder
from lit_jax.api.towers import TextModel, VisionModel

__all__ = ["DualEncoder", "TextModel", "VisionModel"]
