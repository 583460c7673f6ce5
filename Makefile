# Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
PY ?= $(BIN)/python
DATA_ROOT ?= $(ADVTRAIN_DATA_ROOT)

# What evaluations are compared with. Their own pins are years old and conflict: without them.
REFERENCES := torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1

.PHONY: demo test test-all chaos lint format bench bench-scale gpu-check clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(REFERENCES)
	touch $@

demo: .venv/installed ## the whole way, on data that ships with scikit-learn: under three minutes
	$(BIN)/advtrain tune digits_quick

test: .venv/installed ## the default tests: under ten minutes
	$(BIN)/python -m pytest

test-all: .venv/installed ## with the slow ones: killed workers, the demo itself
	$(BIN)/python -m pytest -m "slow or not slow"

chaos: .venv/installed ## faults on a Ray of several nodes, and the table of what became of them
	$(BIN)/python -m pytest -m chaos tests/chaos

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed ## needs MNIST: make bench DATA_ROOT=/path/to/data
	$(BIN)/python -m tests.benchmarks.bench_train --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_resnet --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_workers --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_methods --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_evaluate --data-root $(DATA_ROOT)
	$(BIN)/python -m tests.benchmarks.bench_tune --seeds 3

gpu-check: ## every GPU path, in under eight minutes; needs a GPU and PyTorch alone: make gpu-check PY=python3
	$(PY) -m tests.benchmarks.gpu_check $(ARGS)

bench-scale: .venv/installed ## Ray Train against torchrun, 1 to 4 workers; needs MNIST
	$(BIN)/python -m tests.benchmarks.bench_scale --data-root $(DATA_ROOT)

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
