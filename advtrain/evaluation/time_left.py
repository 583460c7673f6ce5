"""Time that the attacks of an evaluation still take, from the speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from advtrain.attacks import FailureSearch


class TimeLeft:
    """Estimate of the time that the attacks still take if no further sample is broken.

    As a rule it is too high, because attacks skip broken samples.

    Args:
        attacks: attacks in their order.
        clock: returns the time in seconds.
    """

    def __init__(self, attacks: Sequence[FailureSearch], clock: Callable[[], float] = time.monotonic) -> None:
        self._costs = [[attack.cost] * attack.num_rounds for attack in attacks]
        self._clock, self._started, self._done = clock, clock(), 0.0

    def after(self, number: int, round_: int, samples: int, waiting: int, standing: int) -> float:
        """Return the seconds left after an item.

        Args:
            number: attack of the item.
            round_: its round.
            samples: samples of the item.
            waiting: samples of this round that are not attacked yet.
            standing: samples that no attack has broken yet.
        """
        self._done += samples * self._costs[number][round_]
        later = sum(self._costs[number][round_ + 1 :]) + sum(map(sum, self._costs[number + 1 :]))
        left = waiting * self._costs[number][round_] + standing * later
        return (self._clock() - self._started) * left / self._done
