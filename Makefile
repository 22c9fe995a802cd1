PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Waiting threads sleep instead of spinning: on a busy machine small networks run up to 18 times as fast.
export OMP_WAIT_POLICY ?= passive

# What is not imported need not be compiled: half of the time that an installation takes.
QUIETLY := --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-all docs clean

demo: $(STAMP)
	$(BIN)/cria run digits

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not slow'

# More cases of what `test` tries on some: before a release, and after a change to what they are about.
test-all: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# The site, from docs/ and the docstrings; it needs nothing from the network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo site/index.html

# torch first: the pin takes a CPU build where an index offers one. The libraries of the benchmarks' networks
# and the peer last and alone: what they require would bring a second torch, built for CUDA. torchvision and
# timm stay apart, see benchmarks/zoo.py.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIETLY) -c constraints.txt torch
	$(BIN)/pip install $(QUIETLY) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install $(QUIETLY) -c constraints.txt --no-deps torch-pruning
	$(BIN)/pip install $(QUIETLY) -c constraints.txt --no-deps --target .venv/vision torchvision timm
	touch $@

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
