"""Fixtures shared by all tests: the data root, a local Ray, an MLflow store, the shipped recipes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch

from tests.kit import ROOT, SHIPPED

os.environ["PYTHONPATH"] = str(ROOT)  # Ray workers import modules of the tests


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder with MNIST and CIFAR-10; skip the test if ADVTRAIN_DATA_ROOT is not set."""
    root = os.environ.get("ADVTRAIN_DATA_ROOT")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("ADVTRAIN_DATA_ROOT names no folder with MNIST")
    return Path(root)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start one local Ray for the session; its four CPUs may be more than the machine has."""
    import ray

    from advtrain.cluster import start_ray

    with mock.patch("advtrain.cluster.available_cores", return_value=4):
        start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an empty MLflow SQLite store once, because it takes seconds."""
    from advtrain.tracking.store import open_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(_store_template: Path, tmp_path: Path) -> str:
    """Return the URI of a separate MLflow store for this test."""
    shutil.copy(_store_template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(params=sorted(SHIPPED), ids=lambda path: path.stem)
def shipped_recipe(request: pytest.FixtureRequest) -> Path:
    """Return the path of each shipped recipe."""
    return request.param
