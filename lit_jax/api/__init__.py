"""Dual encoders and towers as Python objects: load, embed, compare, save.

The interface is that of transformers' VisionTextDualEncoderModel, CLIPModel, SiglipModel, AlignModel and
AltCLIPModel, in JAX: `module` is a linen module, and each call accepts the tree `params` as an argument. A
call is therefore a function of JAX that can be differentiated (in reverse mode), vmapped, compiled and
sharded.
"""

from lit_jax.api.dual_encoder import DualEncoder
from lit_jax.api.towers import TextModel, VisionModel

__all__ = ["DualEncoder", "TextModel", "VisionModel"]
