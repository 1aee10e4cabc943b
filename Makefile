# Two commands a new user needs: `make demo` and `make test`. Both install what they need once, then skip it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two cores are enough for everything here; more threads only slow small tensors down.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all check format clean

demo: $(VENV)/installed
	$(BIN)/spikeformers train digits
	@echo "Next: . $(VENV)/bin/activate && spikeformers --help"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not gpu"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/lengths.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# editable_mode=compat: a plain path entry, so that a script beside a clone called spikeformers still finds the package.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable ".[dev]"
	touch $@
