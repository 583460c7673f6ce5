"""Compute the highest rates of false promotions of the rule `robust_gain`, exactly.

    python -m tests.benchmarks.gate_rates [--samples N ...] [--margins M ...]

A false promotion is a gain that the test finds significant at ALPHA although the true gain is the margin. Its rate
depends on the share of lost samples, which is unknown, so the table has the highest rate over all shares, in percent.
Each cell has two rates: of `gain_test`, and of the score test of Tango (1998), which takes the same statistic as
normally distributed. It takes about five minutes on one core. The script exits with 1 if a rate of `gain_test` is above
ALPHA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm

from advtrain.evaluation import gain_test
from advtrain.evaluation.statistics import rejection_rate, tango_statistic

ALPHA = 0.05


def score_test(gained: int, lost: int, total: int, margin: float) -> float:
    """Return the approximate p-value of Tango's score test."""
    return float(norm.sf(tango_statistic(gained, lost, total, margin)))


def least_rejected(test: Callable[..., float], total: int, margin: float) -> Any:
    """Return the smallest number of gained samples with p < ALPHA, by the number of lost samples (N + 1,).

    The boundary rises with the lost samples, so each search starts at the one before.
    """
    least, found = 0, []
    for lost in range(total + 1):
        while least <= total - lost and test(least, lost, total, margin) >= ALPHA:
            least += 1
        found.append(min(least, total - lost + 1))
    return np.array(found)


def highest_rate(least: Any, margin: float, points: int = 2000) -> float:
    """Return the highest probability of a rejection over the shares of lost samples."""
    rarer = np.linspace(0, np.sqrt((1 - abs(margin)) / 2), points) ** 2
    return max(rejection_rate(least, share + max(0.0, -margin), margin) for share in rarer)


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--margins", type=float, nargs="+", default=[-0.05, -0.02, -0.01, 0.01, 0.02, 0.05])
    args = parser.parse_args()
    print("| samples |" + "".join(f" {100 * margin:+g} points |" for margin in args.margins))
    print("|---|" + "---|" * len(args.margins))
    worst = 0.0
    for total in args.samples:
        cells = []
        for margin in args.margins:
            exact, score = (
                highest_rate(least_rejected(test, total, margin), margin) for test in (gain_test, score_test)
            )
            worst = max(worst, exact)
            cells.append(f"{100 * exact:.2f} / {100 * score:.2f}")
        print(f"| {total:,} | {' | '.join(cells)} |", flush=True)
    return int(worst > ALPHA)


if __name__ == "__main__":
    raise SystemExit(main())
