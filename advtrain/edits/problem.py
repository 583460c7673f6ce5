"""State of the search for one text: its queries, lowest margins and misclassification."""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from advtrain.edits.candidates import Candidates, Chosen

T = TypeVar("T")
#: Steps of a search, which yields texts, receives their margins (n,) float64, and returns a value.
Steps = Generator[list[str], NDArray[np.float64], T]

#: Candidates of each size that a beam keeps.
WIDTH = 5
#: Texts of the first request for a list of candidates, and of its largest ones. A list ends at the first
#: misclassification, so the first requests are small.
FIRST_CHUNK, CHUNK = 64, 2048
#: Rounds without a new query after which a random search ends.
STALLED = 10


@dataclass(frozen=True)
class Change:
    """Replacement of text[start:end], which is `old`, by `new`."""

    start: int
    end: int
    old: str
    new: str


class Problem:
    """Search for one text.

    Args:
        text: original text.
        candidates: sets of its edits.
        at_most: radius.
        budget: most queries, at least 1, with that for the original text.
        generator: source of random numbers.
    """

    def __init__(
        self, text: str, candidates: Candidates, at_most: int, budget: int, generator: random.Random
    ) -> None:
        self.text, self.candidates, self.at_most = text, candidates, at_most
        self.budget, self.generator = budget, generator
        self.known: dict[Hashable, float] = {}  # key -> margin
        self.proven = -1
        self.lowest = float("inf")
        self.broken: Chosen | None = None
        #: Margins of the single edits that were scored, and the best sets of each size with their margins.
        self.singles: dict[int, float] = {}
        self.states: dict[int, list[tuple[float, Chosen]]] = {}
        self._broken_margin = float("inf")

    @property
    def queries(self) -> int:
        """Number of texts that were sent to the model. No text is sent twice."""
        return len(self.known)

    @property
    def left(self) -> int:
        """Number of queries that are left of the budget."""
        return self.budget - self.queries

    def query(self, chosen: Sequence[Chosen], texts: list[str]) -> Steps[NDArray[np.float64]]:
        """Return the margins (n,) of candidates; record the lowest ones and a misclassification."""
        found = yield texts
        best = np.argsort(found, kind="stable")[:WIDTH]
        self.lowest = min(self.lowest, float(found[best[0]]))
        for i in best.tolist():
            kept = self.states.setdefault(len(chosen[i]), [])
            if (state := (float(found[i]), chosen[i])) not in kept:
                self.states[len(chosen[i])] = heapq.nsmallest(WIDTH, [*kept, state])
        for each, margin in zip(chosen, found.tolist(), strict=True):
            if len(each) == 1:
                self.singles[each[0]] = margin
        for i in np.flatnonzero(found <= 0):
            self._note(chosen[int(i)], float(found[i]))
        return found

    def _note(self, chosen: Chosen, margin: float) -> None:
        """Keep the misclassification with the fewest edits, and of these the one with the lowest margin."""
        old = self.broken
        if old is None or (len(chosen), margin) < (len(old), self._broken_margin):
            self.broken, self._broken_margin = chosen, margin

    def query_all(self, waiting: Iterable[tuple[Chosen, str]], most: int | None = None) -> Steps[None]:
        """Search candidates until one is misclassified or `most` new queries are used.

        `waiting` are candidates with their texts. `most` is None if there are no more of them than queries that are
        left.
        """
        rest, size, before = iter(waiting), FIRST_CHUNK, self.queries
        while self.broken is None:
            part = list(islice(rest, size if most is None else min(size, most - self.queries + before)))
            if not part:
                return
            yield from self.query([chosen for chosen, _ in part], [text for _, text in part])
            size = min(2 * size, CHUNK)

    def with_texts(self, sets: Iterable[Chosen]) -> Iterator[tuple[Chosen, str]]:
        """Yield candidates with their texts."""
        return ((chosen, self.candidates.apply(chosen)) for chosen in sets)

    def changes(self) -> tuple[Change, ...]:
        """Return the edits of the misclassified candidate, in order of their places."""
        edits = [self.candidates.edits[i] for i in self.broken or ()]
        return tuple(Change(e.start, e.end, self.text[e.start : e.end], e.new) for e in edits)
