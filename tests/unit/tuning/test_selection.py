"""The order of candidates costs one read of each trial, and it is that of a comparison of all pairs."""

from __future__ import annotations

import random

import pytest

from tests.unit.tuning.synthetic import TWO, SyntheticLedger, campaign_of, run_trial
from tuning.selection import Candidate, ParetoFront, Ranking, candidates, to_confirm

STATUSES = ("finished", "finished", "stopped", "failed", "running")
ONE = {"objectives": {"robust_accuracy": "max"}}
WEIGHTED = {"objectives": {"robust_accuracy": 0.3, "clean_accuracy": 0.7}}


def filled(count: int, changes: dict, statuses: tuple[str, ...] = ("finished",)) -> SyntheticLedger:
    ledger, generator = SyntheticLedger(campaign_of(changes)), random.Random(count)
    for _ in range(count):
        run_trial(ledger, generator, statuses)
    return ledger


def compare_all_pairs(found: list[Candidate]) -> list[tuple[int, bool]]:
    """Return (number, on front) of each candidate, best first, by the definition of the front."""

    def values(candidate: Candidate) -> list[float]:
        return candidate.campaign.values(candidate.figures)

    def is_beaten(candidate: Candidate) -> bool:
        mine = values(candidate)
        return any(
            values(other) != mine and all(x >= y for x, y in zip(values(other), mine, strict=True))
            for other in found
            if other.tier == candidate.tier
        )

    front = {c.trial.number: c.campaign.pareto and not is_beaten(c) for c in found}
    found = sorted(found, key=lambda c: c.trial.number)
    found = sorted(found, key=lambda c: (c.tier, front[c.trial.number], c.score), reverse=True)
    return [(c.trial.number, front[c.trial.number] and c.tier == found[0].tier) for c in found]


@pytest.mark.parametrize("changes", [ONE, WEIGHTED, TWO])
def test_candidates_have_the_order_of_a_comparison_of_all_pairs(changes):
    ledger = filled(120, changes, STATUSES)
    generator = random.Random(1)
    for chosen in to_confirm(ledger)[:4]:
        for seed in (1, 2):
            trial = ledger.begin({}, {}, of=chosen.trial, seed=seed)
            trial.run.figures = [(round(generator.random(), 1), round(generator.random(), 1))]
            ledger.close(trial, generator.choice(("finished", "failed")))
    found = candidates(ledger)
    assert [(c.trial.number, c.on_front) for c in found] == compare_all_pairs(found)
    assert {c.tier for c in found} > {(True, False, True), (True, False, False)}


@pytest.mark.parametrize("changes", [ONE, WEIGHTED, TWO])
def test_ranking_has_the_best_candidate_after_each_end(changes):
    ledger, generator = SyntheticLedger(campaign_of(changes)), random.Random(0)
    ranking = Ranking(ledger)
    for _ in range(60):
        ranking.add(run_trial(ledger, generator, STATUSES[:4]))
        first = ranking.best()
        assert (first and first.trial) is (candidates(ledger)[0].trial if first else None)
    for chosen in to_confirm(ledger)[:5]:
        for seed in (1, 2):
            trial = ledger.begin({}, {}, of=chosen.trial, seed=seed)
            trial.run.figures = [(round(generator.random(), 1), round(generator.random(), 1))]
            ledger.close(trial, generator.choice(("finished", "failed")))
            ranking.add(trial)
            first, wanted = ranking.best(), candidates(ledger)[0]
            assert (first.trial, first.figures) == (wanted.trial, wanted.figures)


class Value(float):
    """Number that counts comparisons."""

    compared = 0

    def __lt__(self, other):
        Value.compared += 1
        return float.__lt__(self, other)

    def __le__(self, other):
        Value.compared += 1
        return float.__le__(self, other)

    def __ge__(self, other):
        Value.compared += 1
        return float.__ge__(self, other)


@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_pareto_front_compares_a_new_point_with_few_others(count):
    generator, front = random.Random(count), ParetoFront()
    points = [(Value(x), Value(1 - x)) for x in (generator.random() for _ in range(count))]
    for point in points[:-1]:  # all are on the front, the worst case
        assert front.add(point)
    Value.compared = 0
    front.add(points[-1])
    assert Value.compared <= count.bit_length() + 4
    assert front.add((Value(2), Value(2)))
    assert len(front.points) == 1


@pytest.mark.parametrize(("changes", "count"), [(ONE, 1_000), (TWO, 100), (TWO, 1_000), (TWO, 10_000)])
def test_ranking_reads_each_trial_once(changes, count):
    ledger, generator = SyntheticLedger(campaign_of(changes)), random.Random(count)
    ranking = Ranking(ledger)
    for number in range(1, count + 1):
        ranking.add(run_trial(ledger, generator))
        assert ranking.best() is not None
        assert ledger.reads.metrics == number
    found = candidates(ledger)
    assert ledger.reads.metrics == 2 * count
    assert found[0].trial is ranking.best().trial
