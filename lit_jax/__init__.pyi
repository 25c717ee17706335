# For editors and type checkers: __init__.py looks these up only when they are asked for.
from lit_jax.api import DualEncoder as DualEncoder
from lit_jax.api import TextModel as TextModel
from lit_jax.api import VisionModel as VisionModel
from lit_jax.train import fit as fit
from lit_jax.training.workdir import load_run as load_run

__version__: str
