"""Signals between steps: a request to stop, and a preemption notice for one of our nodes."""

from __future__ import annotations

import time
from typing import Literal

from advtrain.runs.folder import RunFolder
from advtrain.training.session import Session

#: Seconds between checks for a preemption notice, and between checkpoints after a notice.
NOTICE_S, LEAVING_S = 1.0, 15.0

Signal = Literal["stop", "save"] | None


class Signals:
    """Rank 0 reads the signals; all ranks act on the same one at the same step."""

    def __init__(self, run: RunFolder, session: Session) -> None:
        self.run, self.session = run, session
        self.notice: str | None = None  # the preemption notice, if there is one
        self._checked = self._saved = time.monotonic()

    def stop_wanted(self) -> bool:
        """Return whether the run was asked to stop. Collective call."""
        wanted = self.session.rank == 0 and self.run.stop_requested()
        return self.session.agree("stop" if wanted else None) is not None

    def poll(self) -> Signal:
        """Return what all ranks must do now: "stop", "save" or None. Collective call."""
        signal = self.session.agree(self._requested() if self.session.rank == 0 else None)
        if signal == "ask" and self.session.notice is not None:
            self._checked = time.monotonic()
            self.notice = self.session.notice()
            signal = "save" if self.notice else None
        if signal == "save":
            self._saved = time.monotonic()
            return "save"
        return "stop" if signal == "stop" else None

    def _requested(self) -> str | None:
        now = time.monotonic()
        if self.run.stop_requested():
            return "stop"
        if self.notice:  # steps since the last checkpoint are lost with the node
            return "save" if now - self._saved >= LEAVING_S else None
        return "ask" if self.session.notice is not None and now - self._checked >= NOTICE_S else None
