# Everything runs in .venv, which is created on first use.
PYTHON ?= python3
BIN := .venv/bin
PY ?= $(BIN)/python
DATA_ROOT ?= $(ADVTRAIN_DATA_ROOT)

# Reference implementations for the evaluation. Their pinned dependencies are outdated and conflict, hence --no-deps.
REFERENCES := torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1

.PHONY: demo test test-all chaos lint format docs bench bench-scale gpu-check clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
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
	$(BIN)/python -m tests.benchmarks.bench_evaluate --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_tune --seeds 3

gpu-check: ## test every GPU path, in under eight minutes; needs only a GPU and PyTorch: make gpu-check PY=python3
	$(PY) -m tests.benchmarks.gpu_check $(ARGS)

bench-scale: .venv/installed ## compare Ray Train with torchrun on 1 to 4 workers; needs MNIST
	$(BIN)/python -m tests.benchmarks.bench_scale --data-root $(DATA_ROOT)

clean:
	rm -rf build docs/_build docs/reference/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
