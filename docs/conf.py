"""The site of lit_jax: `make docs` builds it into docs/_build/html."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The extension beside this file, and the package as it stands here, whatever is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
# The kernel of the tutorial is a process of its own.
os.environ["PYTHONPATH"] = str(ROOT)

import lit_jax  # noqa: E402  (needs the path)

project = "lit_jax"
version = release = lit_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"lit_jax {version}"

myst_enable_extensions = ["deflist"]
# Headings down to the third level can be linked to, as on a Git host.
myst_heading_anchors = 3
# The tutorial runs in each build; an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# What a cell prints while it trains is one block, not a block for each line.
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
