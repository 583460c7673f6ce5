"""Confidence intervals of proportions, and significance tests on paired samples."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

#: Error probability of the confidence interval in `gain_test`, the smallest p-value with a margin.
GAMMA = 1e-6


class Share(BaseModel):
    """A share of samples, with its 95 % Wilson score interval."""

    model_config = ConfigDict(frozen=True)
    value: float
    low: float
    high: float
    count: int
    total: int

    @classmethod
    def of(cls, flags: Any) -> Self:
        """Return the share of true flags, (N,) bool."""
        count, total = int(np.sum(flags)), len(flags)
        low, high = wilson(count, total)
        return cls(value=count / total if total else 0.0, low=low, high=high, count=count, total=total)

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} %  [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `count` out of `total`; (0, 1) for no samples."""
    from scipy.stats import binomtest

    if total == 0:
        return 0.0, 1.0
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(confidences: Any, right: Any, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        confidences: (N,) probabilities of the predicted class.
        right: (N,) bool, whether that class is the label.
        bins: number of equal-width intervals of [0, 1]; each is closed above.
    """
    confidence, hit = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    cell = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = [abs(float((hit[cell == b] - confidence[cell == b]).sum())) for b in range(bins)]
    return sum(gaps) / len(confidence)


def sign_test(first: int, second: int) -> float:
    """Return the one-sided p-value of the exact sign test: small if `first` is the larger count.

    It is the probability of at least `first` heads in `first + second` tosses of a fair coin, and 1 for no tosses.
    """
    from scipy.stats import binomtest

    return float(binomtest(first, first + second, alternative="greater").pvalue) if first + second else 1.0


def gain_test(gained: int, lost: int, total: int, margin: float) -> float:
    """Return the one-sided p-value of a gain in accuracy above `margin`, on paired samples.

    Both tests are exact: the rate of false rejections is at most the significance level for any number of samples.
    A margin of 0 uses McNemar's test. Given `gained + lost`, the gained samples are then binomial with share 1/2, so no
    unknown share is left. For other margins one is left, and the test is that of Hsueh, Liu and Chen (2001, Biometrics
    57:478-483): the probability of a `tango_statistic` at least as large as the observed one, maximized over the share
    of lost samples. As in Berger and Boos (1994, JASA 89:1012-1016), the maximum is taken over a confidence interval,
    and its error probability GAMMA is added. The interval depends on `gained + lost` alone and the statistic increases
    with `gained` for a given sum, so a gain below the margin has no higher rate than the margin itself.

    Args:
        gained: number of samples that only the second model classifies correctly.
        lost: number of samples that only the first model classifies correctly.
        total: number of all samples.
        margin: largest difference of the two accuracies under the null hypothesis, in (-1, 1).
    """
    if margin == 0:
        return sign_test(gained, lost)
    least = _least_gained(tango_statistic(gained, lost, total, margin), total, margin)
    # Grid of the rarer outcome's share: its square root, scaled by sqrt(total), has a standard deviation near 1/2.
    low, high = np.sqrt(_rarer_share(gained + lost, total, margin))
    for points in (51, 21):
        grid = np.linspace(low, high, points)
        tails = [rejection_rate(least, share + max(0.0, -margin), margin) for share in grid**2]
        best = int(np.argmax(tails))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return min(1.0, max(tails) + GAMMA)


def tango_statistic(gained: Any, lost: Any, total: int, margin: float) -> Any:
    """Return the score statistic of paired samples for a margin other than 0.

    It increases with `gained` and decreases with `lost`; both may be arrays (Tango 1998, Statistics in Medicine
    17:891-908).
    """
    # Maximum-likelihood share of lost samples under gain = margin: the larger root of a q^2 + b q + c.
    a, b = 2 * total, (2 * total - gained + lost) * margin - gained - lost
    c = -lost * margin * (1 - margin)
    q = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return (gained - lost - total * margin) / np.sqrt(total * (2 * q + margin * (1 - margin)))


def rejection_rate(least: Any, share: float, margin: float) -> float:
    """Return the probability that a paired sample is rejected, under gain = margin.

    Args:
        least: (N + 1,) smallest number of gained samples that is rejected, by the number of lost samples.
        share: expected share of lost samples; that of gained ones is `share + margin`.
        margin: gain in accuracy.
    """
    from scipy.stats import binom

    total = len(least) - 1
    # Lost samples beyond 8 standard deviations have a probability below 1e-14.
    width = 8 * np.sqrt(total * share) + 20
    lost = np.arange(max(0, int(total * share - width)), min(total, int(total * share + width)) + 1)
    gained = min(1.0, max(0.0, share + margin) / (1 - share))  # share of gained among the not lost ones
    return float(binom.pmf(lost, total, share) @ binom.sf(least[lost] - 1, total - lost, gained))


def _least_gained(statistic: float, total: int, margin: float) -> Any:
    """Return the smallest number of gained samples with this statistic, by lost samples (N + 1,)."""
    lost = np.arange(total + 1)
    low, high = np.zeros_like(lost), total + 1 - lost
    while (low < high).any():
        middle = (low + high) // 2
        reached = tango_statistic(np.minimum(middle, total - lost), lost, total, margin) >= statistic - 1e-9
        low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
    return low


def _rarer_share(differing: int, total: int, margin: float) -> tuple[float, float]:
    """Return the interval of the smaller of the shares of gained and lost samples, under gain = margin."""
    from scipy.stats import binomtest

    interval = binomtest(differing, total).proportion_ci(1 - GAMMA, method="exact")
    least, most = ((max(end, abs(margin)) - abs(margin)) / 2 for end in interval)
    return float(least), float(most)


def surely_above(count: int, total: int, share: float) -> bool:
    """Return whether `count / total` is above `share` (exact one-sided test, p < 0.01)."""
    from scipy.stats import binomtest

    return total > 0 and float(binomtest(count, total, share, alternative="greater").pvalue) < 0.01


class Paired(BaseModel):
    """Comparison of two models on the same samples with McNemar's exact test."""

    model_config = ConfigDict(frozen=True)
    first: Share
    second: Share
    only_first: int
    only_second: int
    p_value: float  # two-sided

    @classmethod
    def of(cls, first: Any, second: Any) -> Self:
        """Compare flags (N,) bool of the same samples in the same order (McNemar 1947, exact)."""
        from scipy.stats import binomtest

        one, other = np.asarray(first, bool), np.asarray(second, bool)
        a, b = int((one & ~other).sum()), int((other & ~one).sum())
        p = float(binomtest(a, a + b).pvalue) if a + b else 1.0
        return cls(first=Share.of(one), second=Share.of(other), only_first=a, only_second=b, p_value=p)

    def __str__(self) -> str:
        gap = 100 * (self.second.value - self.first.value)
        return f"{gap:+.2f} points ({self.only_second} against {self.only_first} samples, p = {self.p_value:.2g})"
