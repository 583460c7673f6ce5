"""Shared by all tests: the data root, a one-process Ray, a prepared MLflow store, small recipes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch

from tests.kit import ROOT, SHIPPED

os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers import what the tests name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with MNIST and CIFAR-10; tests that need them skip where it is not named."""
    root = os.environ.get("ADVTRAIN_DATA_ROOT")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("ADVTRAIN_DATA_ROOT names no folder with MNIST")
    return Path(root)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the session."""
    import ray

    from advtrain.cluster import start_ray

    start_ray(None, 4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow SQLite store, made once: it takes seconds."""
    from advtrain.tracking.store import open_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(_store_template: Path, tmp_path: Path) -> str:
    """URI of an MLflow store of this test's own."""
    shutil.copy(_store_template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(params=sorted(SHIPPED), ids=lambda path: path.stem)
def shipped_recipe(request: pytest.FixtureRequest) -> Path:
    """Each shipped recipe in turn."""
    return request.param
