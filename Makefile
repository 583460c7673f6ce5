# Everything runs in .venv, which is created on first use.
PYTHON ?= python3
BIN := .venv/bin
PY ?= $(BIN)/python
DATA_ROOT ?= $(ADVTRAIN_DATA_ROOT)

# Reference implementations for the evaluation. Their pinned dependencies are outdated and conflict, hence --no-deps.
REFERENCES := torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1

.PHONY: demo test test-all chaos lint format docs bench bench-scale gpu-check lock sbom audit licenses clean

# LOCKED=1, as in CI, installs exactly the files whose hashes the lock lists.
.venv/installed: pyproject.toml infra/requirements-dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -z "$(LOCKED)" || $(BIN)/python -m pip install --quiet --require-hashes --no-deps -r infra/requirements-dev.lock
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(REFERENCES)
	touch $@

demo: .venv/installed ## search, evaluate and register on digits, in under three minutes
	$(BIN)/advtrain tune digits_quick

test: .venv/installed ## run the default tests, in under eight minutes
	$(BIN)/python -m pytest

test-all: .venv/installed ## run all tests, including slow ones such as killed workers and the demo
	$(BIN)/python -m pytest -m "slow or not slow"

chaos: .venv/installed ## inject faults into a Ray cluster of several nodes, and print a table of the results
	$(BIN)/python -m pytest -m chaos tests/chaos

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: .venv/installed ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env docs docs/_build/html

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed ## run the benchmarks; needs MNIST: make bench DATA_ROOT=/path/to/data
	$(BIN)/python -m tests.benchmarks.bench_train --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_resnet --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_workers --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_methods --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_probe --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_evaluate --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_tune --seeds 3
	$(BIN)/python -m tests.benchmarks.bench_driver
	$(BIN)/python -m tests.benchmarks.bench_memory

gpu-check: ## test every GPU path, in under eight minutes; needs only a GPU and PyTorch: make gpu-check PY=python3
	$(PY) -m tests.benchmarks.gpu_check $(ARGS)

bench-scale: .venv/installed ## compare Ray Train with torchrun on 1 to 4 workers; needs MNIST
	$(BIN)/python -m tests.benchmarks.bench_scale --data-root $(DATA_ROOT)

# The tools of the supply chain run in an environment of their own, because they are not needed to train or to test.
TOOLS := .venv-tools/bin
.venv-tools/installed:
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/python -m pip install --quiet uv pip-audit cyclonedx-bom
	touch $@

COMPILE := $(TOOLS)/uv pip compile --quiet --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --python-version 3.11.5 --python-platform x86_64-unknown-linux-gnu

lock: .venv-tools/installed .venv/installed ## write the lock files with the versions that are installed in .venv
	$(BIN)/python -m pip freeze --exclude-editable > .venv-tools/installed.txt
	$(COMPILE) -c .venv-tools/installed.txt pyproject.toml --extra cluster --extra vision --extra text -o infra/requirements.lock
	$(COMPILE) -c .venv-tools/installed.txt pyproject.toml --extra cluster --extra dev -o infra/requirements-dev.lock
	$(COMPILE) -c .venv-tools/installed.txt infra/mlflow/requirements.in -o infra/mlflow/requirements.lock

sbom: .venv-tools/installed ## write the software bill of materials of the image, CycloneDX, to build/sbom.json
	mkdir -p build
	$(TOOLS)/cyclonedx-py requirements infra/requirements.lock --output-reproducible -o build/sbom.json

audit: .venv-tools/installed ## look for known vulnerabilities of the locked packages; needs the network
	$(TOOLS)/pip-audit --require-hashes --disable-pip -r infra/requirements.lock

licenses: .venv/installed ## write the licenses of the locked packages to infra/LICENSES.md
	$(PY) infra/list_licenses.py > infra/LICENSES.md

clean:
	rm -rf build docs/_build docs/reference/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
