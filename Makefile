# Every target sets up what it needs; a machine with Python 3.11+, gcc, make and git is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
METADATA := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find csrc -type f -not -name '*.pyc')
INTEGRATIONS := .venv-integrations
NEWEST := .venv-newest
HEADERS := build/torch-headers

.PHONY: demo test test-triton test-all lint format gpu-check clean

demo: $(VENV)/.runs
	$(BIN)/python -m seemore_fast.demo -o demo_output

# Triton's kernels, which are interpreted, and two halves of all the rest, two at a time; output comes when each has ended.
test: $(VENV)/.tests
	$(MAKE) --no-print-directory --jobs 2 --output-sync test-triton test-others-1 test-others-2

test-triton: $(VENV)/.tests
	$(BIN)/python -m pytest -q -m "triton and not slow"

test-others-%: $(VENV)/.tests
	$(BIN)/python -m pytest -q -m "not triton and not slow" --part $*/2

test-all: $(VENV)/.tests $(INTEGRATIONS)/.tests $(NEWEST)/.tests $(HEADERS)/.complete
	$(BIN)/python -m pytest -q -m "slow or not slow"
	$(INTEGRATIONS)/bin/python -m pytest -q -m slow tests/test_integrations.py

lint: $(VENV)/.lints
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
		| xargs -0 -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lints
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a machine with an NVIDIA GPU, with the Python that has torch there: measures, builds for that GPU, tests and tunes in
# under ten minutes; leaves that Python as it is and needs no network. QUICK=1: what matters most, in three. OUTPUT=folder
# gets one archive of all that comes of it. SECONDS=300 and ONLY="kernels tune" shorten it: see its --help.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(QUICK),--quick) $(if $(OUTPUT),--output "$(OUTPUT)") \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(NEWEST) .venv-gpu build dist demo_output *.egg-info seemore_fast/*.so seemore_fast/build_info.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runs: $(METADATA) $(SOURCES) | $(VENV)/bin/python
	$(PIP) torch setuptools ninja pybind11
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(PIP) build -e '.[test,bench]' --no-build-isolation
	$(PIP) --no-deps seemore
	touch $@

# pyright reads the types of all that the package imports.
$(VENV)/.lints: pyproject.toml constraints.txt | $(VENV)/.tests
	$(PIP) ruff clang-format 'pyright[nodejs]'
	touch $@

# The libraries built with the torch of constraints.txt are tested in the newest one, too (several GB).
$(NEWEST)/.tests: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet torch numpy pillow safetensors tqdm pytest
	touch $@

# The bindings compile with the headers of the oldest torch promised, that of constraints.txt and the newest.
$(HEADERS)/.complete: pyproject.toml constraints.txt tests/helpers/torch_headers.py | $(VENV)/.runs
	$(BIN)/python tests/helpers/torch_headers.py
	touch $@

# BasicSR and spandrel want torchvision and old habits: an environment of their own.
$(INTEGRATIONS)/.tests: tests/requirements-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet -c constraints.txt torch
	$(INTEGRATIONS)/bin/pip install --quiet -r tests/requirements-integrations.txt
	$(INTEGRATIONS)/bin/pip install --quiet --use-pep517 --no-build-isolation --no-deps basicsr==1.4.2
	touch $@
