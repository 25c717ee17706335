"""Importing the package leaves the process as it was: it may be somebody else's notebook or server."""

import subprocess
import sys

# The libraries come first, with those that they import lazily, so that what they change counts as theirs.
# PyTorch and SymPy, which transformers imports where it finds them, are in the oracle environment only.
PROGRAM = """
import ast, importlib.util, logging, os, pathlib, pkgutil, signal, sys, threading, warnings

for name in ("scipy.special", "sympy", "torch", "transformers"):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
import transformers

root = pathlib.Path(importlib.util.find_spec("lit_jax").origin).parent
for file in sorted(root.rglob("*.py")):
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if not name.startswith("lit_jax"):
                try:
                    importlib.import_module(name)
                except ModuleNotFoundError:
                    pass  # a name in a module
transformers.CLIPProcessor


def settings():
    loggers = [logging.getLogger(), *map(logging.getLogger, ("lit_jax", "absl", "asyncio"))]
    return {
        "warnings": list(warnings.filters),
        "hooks": [sys.excepthook, sys.unraisablehook, threading.excepthook, sys.stdout, sys.stderr],
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "logging": [(log.level, log.propagate, log.handlers[:], log.filters[:]) for log in loggers],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "threads": threading.active_count(),
    }


before = settings()
import lit_jax

modules = [module.name for module in pkgutil.walk_packages(lit_jax.__path__, "lit_jax.")]
for name in modules:
    importlib.import_module(name)
assert len(modules) > 50
after = settings()
print({key for key in before if before[key] != after[key]} or "the same")
"""


def test_importing_every_module_changes_nothing_of_the_process():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.stdout == "the same\n", result.stderr
