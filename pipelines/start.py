"""Start weights of runs and campaigns: resolve them once, and report what is loaded."""

from __future__ import annotations

from advtrain.events import Message, Progress
from advtrain.training.start import RunStart


def announced(start: RunStart, progress: Progress) -> RunStart:
    """Report which tensors a new run loads; return its start."""
    if text := str(start):
        progress(Message(text))
    return start
