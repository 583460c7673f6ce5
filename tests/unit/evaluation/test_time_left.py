"""Time left of an evaluation, from the work that is done and the work to come."""

from __future__ import annotations

import numpy as np
import pytest

from advtrain.attacks.suites import build_suite
from advtrain.data import ArraySplit
from advtrain.evaluation import worst_case
from advtrain.evaluation.cache import ResultCache
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
        ("student-50x20", 4),
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


def test_time_left_of_a_resumed_evaluation_does_not_count_cached_items(tmp_path, monkeypatch):
    now, seconds = [0.0], []
    monkeypatch.setattr(worst_case, "TimeLeft", lambda attacks: TimeLeft(attacks, lambda: now[0]))

    def run(items):
        for item in items:  # every sample is robust, and a pair of samples takes 10 s in each of two rounds
            now[0] += 0.0 if item.attack is None else 10.0
            none = {"fallen": [], "predictions": []}
            yield item, none if item.attack == 0 else {"predictions": [0, 0], "confidences": [1.0, 1.0]}

    cache = ResultCache(tmp_path, "digits", {})
    cache.results = {f"0.0.{block}": {"fallen": [], "predictions": []} for block in range(2)}
    cache.path.mkdir()
    split = ArraySplit(np.zeros((8, 4), np.float32), np.zeros(8, np.int64))
    worst_case.evaluate_samples(
        cache.through(run), split, build_suite("pgd-20x2"), 2, lambda *tick: seconds.append(tick[3])
    )
    assert seconds[:6] == [None] * 6  # four clean and two cached items
    assert seconds[6:] == pytest.approx([50, 40, 30, 20, 10, 0])
