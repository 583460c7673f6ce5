"""A store that stops to answer during a run."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from advtrain.errors import UserError
from advtrain.tracking import tracker as module
from advtrain.tracking.tracker import Tracker

URI = "http://127.0.0.1:9"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what the tracker does with the store, in order."""
    found: list[str] = []

    def open_client(uri: str, announce: bool, with_registry: bool) -> object:
        assert not with_registry
        found.append(f"opens, announce={announce}")
        if found.count("opens, announce=False") == 1:
            raise UserError("still silent")
        return object()

    monkeypatch.setattr(module, "open_client", open_client)
    monkeypatch.setattr(module, "warn_after", lambda seconds, text: found.append(text) or nullcontext())
    return found


def test_silent_store_is_named_once_and_opened_before_each_retry(events, tmp_path, monkeypatch, caplog):
    tracker = Tracker(SimpleNamespace(path=tmp_path), object(), {"uri": URI})
    answers = iter([OSError("Read timed out"), None, None])

    def send(self: Tracker) -> None:
        events.append("sends")
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(Tracker, "_send", send)
    with caplog.at_level(logging.WARNING):
        assert [tracker.sync() for _ in range(2)] == [False, False]
        assert tracker.reason == "still silent"
        assert [tracker.sync() for _ in range(2)] == [True, True]
    waiting = f"waiting for MLflow at {URI}"
    opens = "opens, announce=False"
    assert events == [waiting, "sends", opens, opens, "sends", waiting, "sends"]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith(f"MLflow at {URI} is unreachable (Read timed out); training continues")
    assert messages[1] == "MLflow is reachable again; all unsent data was sent"
