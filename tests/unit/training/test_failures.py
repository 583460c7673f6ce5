"""Interruptions of a run: attempts, failed ranks, stragglers, preemption notices."""

from __future__ import annotations

import pytest
import torch

from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder
from advtrain.training import on_ray
from advtrain.training.failures import Failure, begin_attempt, describe_failures, straggler, version_mismatch
from advtrain.training.session import Session, Stopwatch
from advtrain.training.signals import Signals


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path, "digits", "abcdef", "", {"status": "running"})


def test_begin_attempt_reports_why_previous_attempt_ended(run):
    assert begin_attempt(run, ["a", "b"], ["a", "b"], 0) == []
    run.note_interruption("rank 1 on b died")
    (message,) = begin_attempt(run, ["a"], ["a"], 40)
    resumed = "resumed from step 40 with 1 worker instead of 2"
    assert message == f"rank 1 on b died; gone from the cluster: b; {resumed}"
    assert begin_attempt(run, ["a"], ["a"], 60) == []  # a --resume
    (message,) = begin_attempt(run, ["a", "c", "d"], ["a", "c", "d"], 80)
    assert message == "the cluster changed; resumed from step 80 with 3 workers instead of 1"
    assert [attempt["step"] for attempt in run.attempts()] == [0, 40, 60, 80]
    assert [bool(attempt["cause"]) for attempt in run.attempts()] == [False, True, False, False]


def test_describe_failures_names_dead_rank_before_lost_connections():
    lost = Failure("connection_lost", "lost its connection to another worker")
    causes = {0: lost, 1: Failure("died", "died: its process was killed")}
    assert describe_failures(causes, ["a", "b"]) == "rank 1 on b died: its process was killed"
    assert describe_failures({1: causes[0]}, ["a"]) == "rank 1 lost its connection to another worker"


def test_version_mismatch_names_packages_and_nodes():
    assert version_mismatch({"torch": "2"}, [{"torch": "2"}, {"torch": "2"}], ["a", "b"]) == ""
    message = version_mismatch(
        {"torch": "2", "numpy": "1"}, [{"torch": "2", "numpy": "1"}, {"torch": "1"}], ["a", "b"]
    )
    assert "torch is 1 on b (rank 1), but 2 where the command runs" in message
    assert "numpy is None on b" in message
    assert "a (rank 0)" not in message


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1], False),
        ([0.1, 0.9], False),  # less than a second is noise
        ([10.0, 14.0, 10.0], False),
        ([10.0, 16.0, 10.0], True),
        ([4.0, 9.0], True),
        ([0.0, 0.0], False),
    ],
)
def test_straggler_is_far_behind_median_rank(seconds, slow):
    message = straggler(seconds, ["a", "b", "c"], 3)
    assert bool(message) == slow
    if slow:
        assert message.startswith("rank 1 on b is a straggler")


def test_stopwatch_accumulates_and_resets_on_read():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            sum(range(100_000))
    assert watch.read() > 0
    assert watch.read() == 0


def test_poll_checks_preemption_notice_periodically_and_repeats_save(run, monkeypatch):
    asked = []

    def notice() -> str | None:
        asked.append(None)
        return "node b leaves" if len(asked) > 1 else None

    now = [100.0]
    monkeypatch.setattr("advtrain.training.signals.time.monotonic", lambda: now[0])
    signals = Signals(run, Session(notice=notice))
    assert signals.poll() is None  # too early to ask
    heard = []
    for now[0] in (101.5, 101.6, 103.0, 104.0, 117.0, 119.0, 133.0):
        heard.append(signals.poll())
    assert heard == [None, None, "save", None, None, "save", None]
    assert len(asked) == 2
    assert signals.notice == "node b leaves"
    run.request_stop()
    assert signals.poll() == "stop"
    assert signals.stop_wanted()


@pytest.mark.parametrize(("given", "seconds"), [(None, 60), ("8", 8), ("2m", 120), ("0.5", 0.5)])
def test_resize_interval_takes_seconds_and_times(given, seconds, monkeypatch):
    monkeypatch.delenv("ADVTRAIN_RESIZE_S", raising=False)
    if given is not None:
        monkeypatch.setenv("ADVTRAIN_RESIZE_S", given)
    assert on_ray._resize_seconds() == seconds


@pytest.mark.parametrize("given", ["often", "1:30", "0", "-3"])
def test_resize_interval_names_a_value_that_is_no_time(given, monkeypatch):
    monkeypatch.setenv("ADVTRAIN_RESIZE_S", given)
    with pytest.raises(UserError, match="ADVTRAIN_RESIZE_S"):
        on_ray._resize_seconds()
