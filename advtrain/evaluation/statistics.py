"""Confidence intervals of proportions, and significance tests on paired samples."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict


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

    A margin of 0 uses McNemar's exact test. Other margins use the score test of Tango (1998, Statistics in Medicine
    17:891-908), which is McNemar's approximate test at a margin of 0.

    Args:
        gained: number of samples that only the second model classifies correctly.
        lost: number of samples that only the first model classifies correctly.
        total: number of all samples.
        margin: largest difference of the two accuracies under the null hypothesis, in (-1, 1).
    """
    from scipy.stats import norm

    if margin == 0:
        return sign_test(gained, lost)
    # Maximum-likelihood share of lost samples under gain = margin: the larger root of a q^2 + b q + c.
    a, b = 2 * total, (2 * total - gained + lost) * margin - gained - lost
    c = -lost * margin * (1 - margin)
    q = (np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = total * (2 * q + margin * (1 - margin))
    excess = gained - lost - total * margin
    if variance <= 0:
        return 0.0 if excess > 0 else 1.0
    return float(norm.sf(excess / np.sqrt(variance)))


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
