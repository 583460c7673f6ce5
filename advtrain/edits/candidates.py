"""Candidates of a text: the sets of edits whose places do not overlap."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from advtrain.edits.threats import Edit, apply_edits

#: Numbers of the edits of a candidate, in order of their places.
Chosen = tuple[int, ...]


class Candidates:
    """Sets of edits of one text.

    Args:
        text: original text.
        edits: its single edits.
    """

    def __init__(self, text: str, edits: Sequence[Edit]) -> None:
        self.text = text
        self.edits = sorted(edits, key=lambda edit: (edit.low, edit.high))
        places = [(edit.low, edit.high) for edit in self.edits]
        #: Number of the first edit of each place, and the number of edits.
        self._firsts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
        lows = [places[i][0] for i in self._firsts]
        #: First place that begins after the end of place p.
        self._next = [bisect_right(lows, places[i][1]) for i in self._firsts]
        self._firsts.append(len(self.edits))
        #: _ways[k][p]: number of sets of k edits whose places are at least p.
        self._ways = [[1] * len(self._firsts)]

    def count(self, k: int) -> int:
        """Count the candidates of exactly k edits. Different ones may give the same text."""
        return self._suffixes(k)[0]

    def _suffixes(self, k: int) -> list[int]:
        while len(self._ways) <= k and self._ways[-1][0]:
            fewer, ways = self._ways[-1], [0] * len(self._firsts)
            for p in reversed(range(len(self._next))):
                ways[p] = ways[p + 1] + self._edits_of(p) * fewer[self._next[p]]
            self._ways.append(ways)
        return self._ways[min(k, len(self._ways) - 1)]  # the last list is 0 if k is larger

    def _edits_of(self, place: int) -> int:
        """Return the number of edits of a place."""
        return self._firsts[place + 1] - self._firsts[place]

    def all(self, k: int) -> Iterator[tuple[Chosen, str]]:
        """Yield every candidate of exactly k edits with its text, in lexicographic order."""
        return self._continued((), "", 0, 0, k)

    def _continued(
        self, chosen: Chosen, before: str, position: int, first: int, k: int
    ) -> Iterator[tuple[Chosen, str]]:
        """Yield candidates that begin with `chosen` and continue at place `first` or behind it.

        `before` replaces text[:position].
        """
        if k == 0:
            yield chosen, before + self.text[position:]
            return
        text, edits = self.text, self.edits
        for p in range(first, len(self._next)):
            if not self._suffixes(k - 1)[self._next[p]]:
                continue
            for i in range(self._firsts[p], self._firsts[p + 1]):
                head = before + text[position : edits[i].start] + edits[i].new
                if k == 1:
                    yield (*chosen, i), head + text[edits[i].end :]
                else:
                    yield from self._continued((*chosen, i), head, edits[i].end, self._next[p], k - 1)

    def nth(self, k: int, index: int) -> Chosen:
        """Return candidate `index` in [0, count(k)) of those with exactly k edits."""
        chosen: list[int] = []
        first = 0
        for left in range(k, 0, -1):
            ways = self._suffixes(left)
            # Candidates whose first place is at least p are the last ways[p] of the list.
            behind = ways[first] - index
            p = bisect_right(ways, -behind, lo=first, key=lambda count: -count) - 1
            after = self._suffixes(left - 1)[self._next[p]]
            edit, index = divmod(ways[p] - behind, after)
            chosen.append(self._firsts[p] + edit)
            first = self._next[p]
        return tuple(chosen)

    def draw(self, at_most: int, generator: random.Random) -> Chosen:
        """Draw one of the candidates of 1 to `at_most` edits, all with the same probability.

        There must be at least one edit.
        """
        at_most = min(at_most, len(self._next))
        index = generator.randrange(sum(self.count(k) for k in range(1, at_most + 1)))
        for k in range(1, at_most + 1):
            if index < self.count(k):
                return self.nth(k, index)
            index -= self.count(k)
        raise AssertionError("the counts do not add up")

    def fits(self, chosen: Chosen, edit: int) -> bool:
        """Return True if the place of the edit overlaps none of the places of `chosen`."""
        new, at = self.edits[edit], bisect_left(chosen, edit)
        before = self.edits[chosen[at - 1]].high < new.low if at else True
        return before and (at == len(chosen) or new.high < self.edits[chosen[at]].low)

    def apply(self, chosen: Sequence[int]) -> str:
        """Apply the edits of these numbers to the text."""
        return apply_edits(self.text, [self.edits[i] for i in chosen])
