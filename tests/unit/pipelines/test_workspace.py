"""The machine is checked before a run is made, if workers are to be started on it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from advtrain.errors import UserError
from pipelines.workspace import Workspace, check_machine
from tests.kit import digits_recipe


@pytest.mark.parametrize(
    ("workers", "address", "is_up", "error"),
    [
        (1, None, False, "GLOO_SOCKET_IFNAME=eth9 .* this machine"),
        (0, None, False, None),
        (1, "head:6379", False, None),
        (1, None, True, None),
    ],
)
def test_check_machine_checks_the_network_of_workers_started_here(
    monkeypatch, workers, address, is_up, error
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setattr("pipelines.workspace.ray_is_up", lambda: is_up)
    recipe = digits_recipe(f"training.num_workers={workers}", "training.accelerator=cpu")
    workspace = Workspace(Path("runs"), "sqlite:///m.db", Path("data"), address)
    with pytest.raises(UserError, match=error) if error else nullcontext():
        check_machine(recipe, workspace)
