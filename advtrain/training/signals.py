"""What the loop hears between steps: a request to stop, the notice that a node is about to be taken away."""

from __future__ import annotations

import time
from typing import Literal

from advtrain.runs.folder import RunFolder
from advtrain.training.session import Session

#: Seconds between questions whether a node is to be taken away, and then between checkpoints.
NOTICE_S, LEAVING_S = 1.0, 15.0

Word = Literal["stop", "save"] | None


class Signals:
    """Rank 0 listens; all ranks hear the same word at the same step."""

    def __init__(self, run: RunFolder, session: Session) -> None:
        self.run, self.session = run, session
        self.notice: str | None = None  # that a node of ours leaves
        self._asked = self._saved = time.monotonic()

    def stop_wanted(self) -> bool:
        """Whether the run was asked to stop; every rank must call it."""
        wanted = self.session.rank == 0 and self.run.stop_requested()
        return self.session.agree("stop" if wanted else None) is not None

    def hear(self) -> Word:
        """Return what all ranks are to do now; every rank must call it."""
        word = self.session.agree(self._said() if self.session.rank == 0 else None)
        if word == "ask" and self.session.notice is not None:
            self._asked = time.monotonic()
            self.notice = self.session.notice()
            word = "save" if self.notice else None
        if word == "save":
            self._saved = time.monotonic()
            return "save"
        return "stop" if word == "stop" else None

    def _said(self) -> str | None:
        now = time.monotonic()
        if self.run.stop_requested():
            return "stop"
        if self.notice:  # what is trained until the node goes would be lost
            return "save" if now - self._saved >= LEAVING_S else None
        return "ask" if self.session.notice is not None and now - self._asked >= NOTICE_S else None
