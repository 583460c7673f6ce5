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
        lows = [edit.low for edit in self.edits]
        #: Number of the first edit whose place begins after the place of edit i.
        self._next = [bisect_right(lows, edit.high) for edit in self.edits]
        #: _ways[k][i]: number of sets of k edits whose numbers are at least i.
        self._ways = [[1] * (len(self.edits) + 1)]

    def count(self, k: int) -> int:
        """Count the candidates of exactly k edits. Different ones may give the same text."""
        return self._suffixes(k)[0]

    def _suffixes(self, k: int) -> list[int]:
        while len(self._ways) <= k:
            fewer, ways = self._ways[-1], [0] * (len(self.edits) + 1)
            for i in reversed(range(len(self.edits))):
                ways[i] = ways[i + 1] + fewer[self._next[i]]
            self._ways.append(ways)
        return self._ways[k]

    def all(self, k: int) -> Iterator[tuple[Chosen, str]]:
        """Yield every candidate of exactly k edits with its text, in lexicographic order."""
        return self._continued((), "", 0, 0, k)

    def _continued(
        self, chosen: Chosen, before: str, position: int, first: int, k: int
    ) -> Iterator[tuple[Chosen, str]]:
        """Yield candidates that begin with `chosen`; `before` replaces text[:position]."""
        if k == 0:
            yield chosen, before + self.text[position:]
            return
        text, edits = self.text, self.edits
        for i in range(first, len(edits)):
            head = before + text[position : edits[i].start]
            if k == 1:
                yield (*chosen, i), head + edits[i].new + text[edits[i].end :]
            elif self._ways_left(self._next[i], k - 1):
                yield from self._continued(
                    (*chosen, i), head + edits[i].new, edits[i].end, self._next[i], k - 1
                )

    def _ways_left(self, first: int, k: int) -> int:
        return self._suffixes(k)[first]

    def number(self, k: int, index: int) -> Chosen:
        """Return candidate `index` in [0, count(k)) of those with exactly k edits."""
        chosen: list[int] = []
        first = 0
        for left in range(k, 0, -1):
            ways = self._suffixes(left)
            # Candidates whose first number is at least i are the last ways[i] of the list.
            behind = ways[first] - index
            i = bisect_right(ways, -behind, lo=first, key=lambda number: -number) - 1
            index = ways[i] - behind
            chosen.append(i)
            first = self._next[i]
        return tuple(chosen)

    def draw(self, at_most: int, generator: random.Random) -> Chosen:
        """Draw one of the candidates of 1 to `at_most` edits, all with the same probability.

        There must be at least one edit.
        """
        index = generator.randrange(sum(self.count(k) for k in range(1, at_most + 1)))
        for k in range(1, at_most + 1):
            if index < self.count(k):
                return self.number(k, index)
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
