"""Statistics of the promotion rules against independent calculations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm

from advtrain.evaluation import gain_test
from advtrain.evaluation.statistics import GAMMA, calibration_error, tango_statistic


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (12, 30), (30, 12), (41, 40)])
def test_gain_test_is_mcnemar_exact_test_without_margin(gained, lost):
    expected = binom.sf(gained - 1, gained + lost, 0.5) if gained + lost else 1.0
    assert gain_test(gained, lost, 1000, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("margin", [-0.03, -0.01, 0.01, 0.05])
@pytest.mark.parametrize(("gained", "lost"), [(50, 20), (20, 50), (3, 0), (0, 3), (90, 80)])
def test_tango_statistic_is_score_at_maximum_likelihood(gained, lost, margin):
    """Oracle: the share of lost samples by numeric maximization of the multinomial likelihood."""
    n = 1000

    def unlikely(q: float) -> float:
        p = q + margin
        return -(gained * np.log(p) + lost * np.log(q) + (n - gained - lost) * np.log(1 - p - q))

    low, high = max(0.0, -margin) + 1e-12, (1 - margin) / 2 - 1e-12
    q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    score = (gained - lost - n * margin) / np.sqrt(n * (2 * q + margin - margin**2))
    assert tango_statistic(gained, lost, n, margin) == pytest.approx(score, abs=1e-3)


def trinomial(total: int, share: float, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gained, lost and probability of every outcome (K,), for this share of lost samples."""
    gained, lost = np.nonzero(np.add.outer(np.arange(total + 1), np.arange(total + 1)) <= total)
    counts = np.stack([gained, lost, total - gained - lost], 1)
    return gained, lost, multinomial.pmf(counts, total, [share + margin, share, 1 - 2 * share - margin])


@pytest.mark.parametrize(
    ("gained", "lost", "margin"), [(4, 3, -0.05), (0, 0, -0.05), (12, 3, 0.05), (9, 0, 0.1)]
)
def test_gain_test_is_highest_tail_probability_of_statistic(gained, lost, margin):
    """Oracle: every outcome of 60 samples at a fine grid of shares, in the interval of Clopper and Pearson."""
    n = 60
    interval = binomtest(gained + lost, n).proportion_ci(1 - GAMMA, method="exact")
    shares = np.linspace(max(0.0, -margin), (1 - margin) / 2, 600)
    shares = shares[(2 * shares + margin >= interval.low) & (2 * shares + margin <= interval.high)]
    observed, tails = tango_statistic(gained, lost, n, margin), []
    for share in shares:
        one, other, probability = trinomial(n, share, margin)
        tails.append(probability[tango_statistic(one, other, n, margin) >= observed - 1e-9].sum())
    assert gain_test(gained, lost, n, margin) == pytest.approx(max(tails) + GAMMA, rel=1e-3)


def score_test(gained: int, lost: int, total: int, margin: float) -> float:
    return float(norm.sf(tango_statistic(gained, lost, total, margin)))


@pytest.mark.parametrize(("test", "is_exact"), [(gain_test, True), (score_test, False)])
def test_gain_test_keeps_error_rate_where_score_test_exceeds_it(test, is_exact):
    """With 2 % lost at a margin of -2 points nothing is gained, so the lost samples are binomial."""
    lost = np.arange(25)
    rejected = np.array([test(0, int(count), 300, -0.02) < 0.05 for count in lost])
    rate = binom.pmf(lost, 300, 0.02)[rejected].sum() + binom.sf(24, 300, 0.02)
    assert bool(rate <= 0.05) is is_exact


@pytest.mark.parametrize(("share", "margin"), [(0.0, 0.05), (0.01, 0.05), (0.07, -0.05)])
def test_gain_test_has_error_rate_of_at_most_alpha(share, margin):
    """The error rate is the sum of the probabilities of all rejected outcomes of 20 samples."""
    gained, lost, probability = trinomial(20, share, margin)
    likely = probability > 1e-4
    pairs = zip(gained[likely], lost[likely], strict=True)
    rejected = np.array([gain_test(int(g), int(b), 20, margin) < 0.05 for g, b in pairs])
    rate = probability[likely][rejected].sum() + probability[~likely].sum()
    assert 0 < rate <= 0.05


@pytest.mark.parametrize(("n", "margin"), [(50, -0.05), (50, 0.02), (300, -0.02), (1000, 0.01)])
def test_gain_test_is_monotone(n, margin):
    """A further gained sample does not raise the p-value, also where it replaces a lost one."""
    more = [gain_test(gained, 4, n, margin) for gained in range(0, 12, 2)]
    other = [gain_test(gained, 12 - gained, n, margin) for gained in range(13)]
    assert np.all(np.diff(more) <= 1e-12)
    assert np.all(np.diff(other) <= 1e-12)


def test_gain_test_approaches_score_test_for_many_samples():
    assert gain_test(26_000, 25_000, 100_000, 0.005) == pytest.approx(
        score_test(26_000, 25_000, 100_000, 0.005), rel=0.01
    )


@pytest.mark.parametrize(
    ("gained", "lost", "margin", "low", "high"),
    [
        (0, 0, -0.01, 0.99**1000, 1e-3),
        (0, 0, 0.01, 0.999, 1.0),
        (0, 1000, -0.01, 0.999, 1.0),
        (1000, 0, 0.01, 0.0, 1e-5),
    ],
)
def test_gain_test_handles_zero_lost_or_gained_samples(gained, lost, margin, low, high):
    assert low <= gain_test(gained, lost, 1000, margin) <= high


def test_calibration_error_is_mean_gap_within_bins():
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    # Two bins are filled: |0.75 - 0.95| over four samples, |0.5 - 0.55| over two.
    assert calibration_error(confidences, right) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)


def test_calibration_error_matches_loop_over_bins():
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0.1, 1.0, 500)
    right = rng.random(500) < confidences**2
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidences > low) & (confidences <= low + 1 / 15)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidences[inside].mean())
    assert calibration_error(confidences, right) == pytest.approx(total / 500)


def test_calibration_error_counts_confidence_one_in_last_bin():
    assert calibration_error(np.ones(4), np.array([True, True, True, False])) == pytest.approx(0.25)
    assert calibration_error(np.zeros(2), np.array([False, False])) == 0
