# `make train` and `make test` set up all they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests stay in one process: they share its fixtures and what it has compiled. tests/conftest.py orders
# the files.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# The arguments and results of every call of a function are checked against its annotations.
CHECK_CALLS := --jaxtyping-packages=lit_jax,beartype.beartype

.PHONY: train test test-all test-gpu check docs parity lock clean

train: .venv/run.stamp
	$(BIN)/python -m lit_jax.train --config=configs/vit_bert.py --workdir=runs/demo

# `make test CHECKED=1` also checks the calls, which takes a quarter more time.
test: .venv/dev.stamp
	$(PYTEST) $(if $(CHECKED),$(CHECK_CALLS))

# The long tests, and those that compare with a live PyTorch. Many wait for processes, so two cores have work for
# three of them.
test-all: .venv/oracle.stamp
	$(PYTEST) --numprocesses=3 $(CHECK_CALLS) -m "long or oracle"

# What the compiler makes for GPUs; no GPU is needed. In an environment of its own: where none is, the plugin
# that brings this compiler lets every command begin with a traceback.
test-gpu: .venv-gpu/stamp
	.venv-gpu/bin/python -m pytest $(CHECK_CALLS) -m gpu

# Measures the differences from PyTorch again and writes docs/parity.md.
parity: .venv/oracle.stamp
	$(BIN)/python -m tests.parity

# The site, in docs/_build/html. Any warning is an error, and the tutorial is executed.
docs: .venv/docs.stamp
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet -b html docs docs/_build/html

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Moves the locked versions to the newest that requirements*.txt admit; run the tests before committing them.
# The CUDA libraries of PyTorch's build stay out: jax[cuda13] chooses its own.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet -r requirements-oracle.txt -r requirements-docs.txt
	.venv-lock/bin/pip freeze --exclude lit_jax | sed 's/+cpu$$//' | \
		grep -vE '^(nvidia-|cuda-|triton=)' > requirements.lock
	rm -rf .venv-lock

.venv-gpu/stamp: .venv-gpu/bin/pip requirements.txt requirements-dev.txt requirements-gpu.txt requirements.lock
	.venv-gpu/bin/pip install --quiet -c requirements.lock -r requirements-gpu.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-gpu .venv-lock

.venv/bin/pip .venv-gpu/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(@D)/..

.venv/run.stamp: .venv/bin/pip requirements.txt requirements.lock
	$(BIN)/pip install --quiet -c requirements.lock -r requirements.txt
	touch $@

.venv/%.stamp: .venv/run.stamp requirements-%.txt
	$(BIN)/pip install --quiet -c requirements.lock -r requirements-$*.txt
	touch $@
