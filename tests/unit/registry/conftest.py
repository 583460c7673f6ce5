"""Fixtures: a store with a registered model. Versions have no files, which the audit log never reads."""

from __future__ import annotations

from typing import Any

import pytest

from advtrain.tracking.store import open_client


@pytest.fixture
def client(store: str) -> Any:
    found = open_client(store)
    found.create_registered_model("m")
    return found


@pytest.fixture
def run_id(client: Any) -> str:
    return str(client.create_run(client.create_experiment("e")).info.run_id)


@pytest.fixture
def make(client: Any, run_id: str):
    """Return a function that creates a version of m and returns its number."""
    return lambda: str(client.create_model_version("m", f"runs:/{run_id}/model", run_id=run_id).version)
