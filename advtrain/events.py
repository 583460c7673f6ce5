"""Events that a running job passes to a callback.

The command line prints them; a notebook may ignore them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from advtrain.runs.folder import RunFolder

Level = Literal["info", "note", "warning", "success", "error"]


@dataclass(frozen=True)
class Message:
    """Line of text for the user."""

    text: str
    level: Level = "info"


@dataclass(frozen=True)
class TrainingTick:
    """Progress of a training, about twice a second; its run folder has progress and metrics."""

    run: RunFolder


@dataclass(frozen=True)
class EvaluationTick:
    """Completion of one work item of an evaluation."""

    name: str  # pass, such as "apgd-t 3/9"
    done: int
    total: int
    seconds_left: float | None = None  # estimate for all attacks; None: unknown


@dataclass(frozen=True)
class Output:
    """Unchanged output of a job on the cluster."""

    text: str


Event = Message | TrainingTick | EvaluationTick | Output
#: Callback for each event.
Progress = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore an event."""


def evaluation_progress(progress: Progress) -> Callable[[str, int, int, float | None], None]:
    """Return a callback for `evaluate` that reports to a job's callback."""
    return lambda *facts: progress(EvaluationTick(*facts))
