"""Handlers of SIGINT and SIGTERM for a part of a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signal_handlers(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handle` on SIGINT and SIGTERM inside the block, also in a background job.

    Only the main thread can set handlers. In other threads, such as a server's, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt; a handler."""
    raise KeyboardInterrupt
