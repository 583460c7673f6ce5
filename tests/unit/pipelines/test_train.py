"""The state of a run is exported to Ray's metrics at every exit."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import MagicMock

import pytest

from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder
from advtrain.training import Outcome
from pipelines import train


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda run: Outcome("stopped", "as requested"), "stopped"),
        (UserError("no nodes"), "failed"),
        (RuntimeError("bug"), "failed"),
        (KeyboardInterrupt(), "stopped"),
        (lambda run: Outcome("finished", ""), "finished"),
    ],
    ids=["stopped", "user error", "error", "interrupted", "finished"],
)
def test_drive_exports_status_at_the_end(tmp_path, monkeypatch, end, status):
    facts = {"status": "running", "data_digest": "", "trained": False}
    run = RunFolder.create(tmp_path, "digits", "0123456789abcdef", "", facts)
    shown = []
    monkeypatch.setattr(train, "show_run", lambda run, recipe: shown.append(run.facts()["status"]))
    monkeypatch.setattr(
        train, "_train", MagicMock(side_effect=end if isinstance(end, BaseException) else [end(run)])
    )
    monkeypatch.setattr(train, "_finish", lambda run, *rest: run.update(status="finished"))
    with suppress(UserError, RuntimeError):
        train._drive(run, MagicMock(), MagicMock(), MagicMock(), MagicMock(), lambda event: None)
    assert shown == [status]
