"""Time left of an evaluation, from the work that is done and the work to come."""

from __future__ import annotations

import pytest

from advtrain.attacks.suites import build_suite
from advtrain.evaluation.time_left import TimeLeft


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("pgd-20", 60),
        ("apgd-ce", 300),
        ("apgd-t-100x9", 300),
        ("eot-apgd-ce-50x10", 1500),
        ("fab-t", 300),
        ("square", 5000),
        ("eot-square-500x10", 5000),
        ("rays-500", 500),
        ("cw-1000x9", 27000),
    ],
)
def test_cost_of_a_round(name, cost):
    (attack,) = build_suite(name)
    assert attack.cost == cost


def test_time_left_follows_speed_costs_and_broken_samples():
    now = [0.0]
    left = TimeLeft(build_suite("pgd-20x2,square-600"), lambda: now[0])
    now[0] = 6.0  # 10 of 40 samples: 600 of 40 * 60 * 2 + 40 * 600 passes, if none is broken
    assert left.after(0, 0, 10, 30, 40) == pytest.approx(6 * (30 * 60 + 40 * 60 + 40 * 600) / 600)
    now[0] = 24.0  # the rest of the first round; 30 samples are broken
    assert left.after(0, 0, 30, 0, 10) == pytest.approx(24 * (10 * 60 + 10 * 600) / 2400)
    now[0] = 30.0
    assert left.after(0, 1, 10, 0, 10) == pytest.approx(30 * 6000 / 3000)
    now[0] = 90.0
    assert left.after(1, 0, 10, 0, 5) == 0
