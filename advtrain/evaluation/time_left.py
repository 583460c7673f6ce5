"""Time that the attacks of an evaluation still take, from the speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from advtrain.attacks import FailureSearch


class TimeLeft:
    """Estimate of the time that the attacks still take if no further sample is broken.

    Attacks skip broken samples, which makes the estimate too high. The masking checks and the curve are not part of it.

    Args:
        attacks: attacks in their order.
        clock: returns the time in seconds.
    """

    def __init__(self, attacks: Sequence[FailureSearch], clock: Callable[[], float] = time.monotonic) -> None:
        self._costs = [[attack.cost] * attack.num_rounds for attack in attacks]
        self._clock, self._started, self._done = clock, clock(), 0.0

    def after(self, number: int, round_: int, samples: int, waiting: int, num_robust: int) -> float | None:
        """Return the seconds left after an item; None as long as no sample was attacked.

        Args:
            number: attack of the item.
            round_: its round.
            samples: samples of the item that were attacked now; 0 if the result comes from a cache.
            waiting: samples of this round that are not attacked yet.
            num_robust: samples that no attack has broken yet.
        """
        self._done += samples * self._costs[number][round_]
        later = sum(self._costs[number][round_ + 1 :]) + sum(map(sum, self._costs[number + 1 :]))
        left = waiting * self._costs[number][round_] + num_robust * later
        return (self._clock() - self._started) * left / self._done if self._done else None
