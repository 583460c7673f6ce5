"""Statistics of the promotion rules against independent calculations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm

from advtrain.evaluation import gain_test
from advtrain.evaluation.statistics import calibration_error


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (12, 30), (30, 12), (41, 40)])
def test_gain_test_is_mcnemar_exact_test_without_margin(gained, lost):
    expected = binom.sf(gained - 1, gained + lost, 0.5) if gained + lost else 1.0
    assert gain_test(gained, lost, 1000, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("margin", [-0.03, -0.01, 0.01, 0.05])
@pytest.mark.parametrize(("gained", "lost"), [(50, 20), (20, 50), (3, 0), (0, 3), (90, 80)])
def test_gain_test_is_score_test_at_maximum_likelihood_with_margin(gained, lost, margin):
    """Oracle: the share of lost samples by numeric maximization of the multinomial likelihood."""
    n = 1000

    def unlikely(q: float) -> float:
        p = q + margin
        return -(gained * np.log(p) + lost * np.log(q) + (n - gained - lost) * np.log(1 - p - q))

    low, high = max(0.0, -margin) + 1e-12, (1 - margin) / 2 - 1e-12
    q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    score = (gained - lost - n * margin) / np.sqrt(n * (2 * q + margin - margin**2))
    assert gain_test(gained, lost, n, margin) == pytest.approx(float(norm.sf(score)), abs=1e-4)


@pytest.mark.parametrize("margin", [-0.02, 0.03])
def test_gain_test_has_stated_error_rate_at_margin(margin):
    rng, n, lost = np.random.default_rng(0), 1000, 0.06
    draws = rng.multinomial(n, [lost + margin, lost, 1 - 2 * lost - margin], size=4000)
    rate = np.mean([gain_test(int(g), int(b), n, margin) < 0.05 for g, b, _ in draws])
    assert 0.04 < rate < 0.062


@pytest.mark.parametrize(
    ("gained", "lost", "margin", "p"), [(0, 0, -0.01, "small"), (0, 0, 0.01, "large"), (10, 0, 0.01, "half")]
)
def test_gain_test_handles_zero_lost_or_gained_samples(gained, lost, margin, p):
    found = gain_test(gained, lost, 1000, margin)
    assert {"small": found < 0.01, "large": found > 0.99, "half": found == pytest.approx(0.5)}[p]


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
