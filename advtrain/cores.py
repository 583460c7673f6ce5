"""Parts of a batch side by side, a core for each.

torch shares each operator out over the cores. Where an operator takes some ten microseconds, that costs: the cores meet
after each, and what one has in its cache the other asks for next. A part of the batch for each core, through all the
operators of a pass, costs nothing of the kind, if the passes leave Python alone (`models/recorded.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from threading import local
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

#: Rows and numbers that a part has at least; less is not worth a core of its own.
ROWS, NUMBERS = 16, 2**14

P = TypeVar("P")
R = TypeVar("R")


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch run each operator on one core, in this thread.

    One that it shares out leaves the other cores turning for milliseconds, in which they wait for the next.
    """
    before = torch.get_num_threads()
    if before == 1:  # setting it, even to what it is, empties caches
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cut(x: Tensor, cores: int) -> list[slice]:
    """Return the rows of each core's part of x (N, ...): a part for each core, or all in one where x is small."""
    if len(x) < cores * ROWS or x.numel() < cores * NUMBERS:
        return [slice(0, len(x))]
    ends = [len(x) * number // cores for number in range(cores + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "part", initializer=_be_a_part)


def _be_a_part() -> None:
    _here.is_part = True
    torch.get_num_threads()  # a thread's first call gives it the process's number
    torch.set_num_threads(1)


_here = local()
os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay with the parent


def side_by_side(function: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    """Return `function(part)` for each part: of the first in this thread, of the others in threads of their own.

    None of them runs any more when this returns or raises, unless it is interrupted a second time. Within a part there
    is one core: its own parts run one after the other.
    """
    if len(parts) == 1 or getattr(_here, "is_part", False):
        return [function(part) for part in parts]
    with one_core():
        others = [_threads(len(parts) - 1).submit(function, part) for part in parts[1:]]
        try:
            first = function(parts[0])
            return [first, *(other.result() for other in others)]
        finally:
            wait(others)


class Ahead:
    """What will be asked for next, made on another core in the meantime."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._planned: tuple[Hashable, Callable[[], Any]] | None = None
        self._begun: tuple[Hashable, Future[Any]] | None = None

    def plan(self, which: Hashable, make: Callable[[], Any]) -> None:
        """Foresee that this will be asked for next, and that `make` gives it."""
        self._planned = which, make

    def begin(self) -> None:
        """Let the first core that has done its parts make what is planned."""
        if self._planned is not None:
            (which, make), self._planned = self._planned, None
            # with the process, since threads stay with the parent of a fork
            self._begun = (which, os.getpid()), _threads(self._cores - 1).submit(make)

    def take(self, which: Hashable, make: Callable[[], R]) -> R:
        """Return what `make` gives, from the other core if that has begun just this."""
        begun, self._begun, self._planned = self._begun, None, None
        if begun is None or begun[0] != (which, os.getpid()):
            return make()
        return cast(R, begun[1].result())
