"""What a job reports while it runs: events for a callback. The command line prints them; a notebook may ignore them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from advtrain.runs.folder import RunFolder

Level = Literal["info", "note", "warning", "success", "error"]


@dataclass(frozen=True)
class Message:
    """A line for a person."""

    text: str
    level: Level = "info"


@dataclass(frozen=True)
class TrainingTick:
    """A training is under way; its folder has the progress and the metrics. About twice a second."""

    run: RunFolder


@dataclass(frozen=True)
class EvaluationTick:
    """A work item of an evaluation is done."""

    name: str  # of the pass, as "apgd-t 3/9"
    done: int
    total: int


@dataclass(frozen=True)
class Output:
    """What a job on the cluster has printed, as it is."""

    text: str


Event = Message | TrainingTick | EvaluationTick | Output
#: Takes each event as it comes.
Progress = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event and do nothing."""


def evaluation_progress(progress: Progress) -> Callable[[str, int, int], None]:
    """Return the callback of `evaluate` that reports to a job's callback."""
    return lambda name, done, total: progress(EvaluationTick(name, done, total))
