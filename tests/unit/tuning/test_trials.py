"""The ledger of a campaign: stored trials, eligible candidates, and their order."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from tests.unit.tuning.surface import ledger_of, show
from tuning.selection import Preference, candidates
from tuning.trials import Ledger

POINT = {"optimizer.lr": 1e-2, "adversary.eps": 0.1}
TWO = {"objectives": {"robust_accuracy": "max", "clean_accuracy": "max"}}


def closed(ledger, *figures, status="finished", **begin):
    trial = ledger.begin(POINT, {}, **begin)
    show(trial, *figures)
    ledger.close(trial, status, "why" if status == "failed" else "")
    return trial


def labels(found):
    return [candidate.trial.label for candidate in found]


def test_ledger_round_trips_through_folder(tmp_path):
    ledger = ledger_of(tmp_path)
    first = closed(ledger, (0.5, 0.9))
    closed(ledger, (0.4, 0.8), of=first, seed=1)
    running = ledger.begin(POINT, {"generation": 2})
    ledger.disqualify(first, "trust: broken")
    again = Ledger.find(tmp_path, ledger.name, {})
    for mine, theirs in zip(
        sorted(ledger.trials, key=lambda t: t.label), sorted(again.trials, key=lambda t: t.label), strict=True
    ):
        assert vars(mine) | {"run": None} == vars(theirs) | {"run": None}
        assert mine.run.path == theirs.run.path
    assert (running.label, running.status) == ("t001", "running")
    assert labels(candidates(again)) == []


def test_trials_are_ordered_by_number(tmp_path):
    ledger = ledger_of(tmp_path)
    for trial in (ledger.begin(POINT, {}) for _ in range(3)):
        trial.run.path.rename(trial.run.path.with_name(f"z{trial.number}"))
    (tmp_path / ledger.name / "trials" / "z0").rename(tmp_path / ledger.name / "trials" / "zz")
    assert [t.number for t in Ledger.find(tmp_path, ledger.name, {}).trials] == [0, 1, 2]


def test_budget_can_be_extended_and_is_validated(tmp_path):
    ledger = ledger_of(tmp_path)
    assert Ledger.find(tmp_path, ledger.name, {"budget.trials": 99}).campaign.budget.trials == 99
    assert Ledger.find(tmp_path, ledger.name, {}).campaign.budget.trials == 99
    with pytest.raises(UserError, match="budget.trials"):
        Ledger.find(tmp_path, ledger.name, {"budget.trials": 0})
    assert Ledger.find(tmp_path, ledger.name, {}).campaign.budget.trials == 99
    with pytest.raises(UserError, match="did you mean"):
        Ledger.find(tmp_path, ledger.name[:-1], {})


def test_trials_remember_the_path_of_data_that_moved(tmp_path):
    ledger = ledger_of(tmp_path)
    first = ledger.begin(POINT, {})
    ledger.move_data("new.npz")
    later = Ledger.find(tmp_path, ledger.name, {}).begin(POINT, {})
    assert [trial.run.facts()["data_path"] for trial in (first, later)] == ["new.npz"] * 2
    assert Ledger.find(tmp_path, ledger.name, {}).facts()["data_path"] == "new.npz"


def test_extended_wall_time_needs_a_unit(tmp_path):
    ledger = ledger_of(tmp_path, {"budget": {"trials": 40, "wall": "1h"}})
    with pytest.raises(UserError, match=r"budget\.wall.*'90' may mean 90s, 90m or 90h"):
        Ledger.find(tmp_path, ledger.name, {"budget.wall": "90"})
    assert Ledger.find(tmp_path, ledger.name, {}).campaign.budget.wall == 3600
    assert Ledger.find(tmp_path, ledger.name, {"budget.wall": "90m"}).campaign.budget.wall == 5400


def test_failed_collapsed_or_guarded_trial_is_not_a_candidate(tmp_path):
    ledger = ledger_of(tmp_path)
    sound = closed(ledger, (0.3, 0.9), (0.25, 0.9))
    failed = closed(ledger, (0.9, 0.9), status="failed")
    collapsed = closed(ledger, (0.9, 0.9), (0.69, 0.9))
    caught = closed(ledger, (0.9, 0.9))
    caught.run.write_recoveries([{"epoch": 1}])
    unmeasured = closed(ledger)
    assert labels(candidates(ledger)) == [sound.label]
    assert failed.disqualified() == "why"
    assert "collapsed from 90.0 to 69.0 %" in collapsed.disqualified()
    assert "guard" in caught.disqualified()
    assert unmeasured.disqualified() == "never validated"


def test_trial_best_is_epoch_of_kept_weights(tmp_path):
    ledger = ledger_of(tmp_path)
    trial = closed(ledger, (0.5, 0.9), (0.6, 0.7), (0.55, 0.95))
    assert trial.best() == {"epoch": 2, "robust_accuracy": 0.6, "clean_accuracy": 0.7}
    line = {"epoch": 4, "val_robust_accuracy": 0.5, "val_clean_accuracy": 0.9}
    trial.run.append_metrics(line | {"val_average_robust_accuracy": 0.8, "val_average_clean_accuracy": 0.85})
    assert trial.best() == {"epoch": 4, "robust_accuracy": 0.8, "clean_accuracy": 0.85}


def test_confirmed_trial_ranks_before_unconfirmed_trial(tmp_path):
    ledger = ledger_of(tmp_path)
    lucky, other = closed(ledger, (0.9, 0.9)), closed(ledger, (0.8, 0.9))
    for seed in (1, 2):
        closed(ledger, (0.6, 0.9), of=lucky, seed=seed)
        closed(ledger, (0.8, 0.9), of=other, seed=seed)
    third = closed(ledger, (0.79, 0.9))
    first, second, last = candidates(ledger)
    assert labels([first, second, last]) == [other.label, lucky.label, third.label]
    assert second.figures["robust_accuracy"] == pytest.approx(0.6)  # without the seed of the selected trial
    assert second.spread("robust_accuracy") == 0
    assert last.spread("robust_accuracy") is None


def test_candidates_rank_pareto_front_first_and_follow_preference(tmp_path):
    ledger = ledger_of(tmp_path, TWO)
    robust, middle, clean = (
        closed(ledger, (0.9, 0.6)),
        closed(ledger, (0.7, 0.9)),
        closed(ledger, (0.2, 0.99)),
    )
    beaten = closed(ledger, (0.69, 0.89))
    closed(ledger, (0.95, 0.95), status="stopped")  # stopped early, ranked after all finished trials
    found = candidates(ledger)
    assert labels(found)[:4] == [middle.label, robust.label, clean.label, beaten.label]
    assert [c.on_front for c in found] == [True, True, True, False, False]

    def preferred(text):
        return labels(Preference.parse(text, ledger.campaign).order(found))

    assert preferred("clean=0.85")[0] == middle.label
    assert preferred("clean=0.95")[0] == clean.label
    assert preferred("robust_accuracy=0.8")[0] == robust.label
    assert preferred("clean=0.999")[0] == clean.label  # no trial satisfies it, so the nearest is first
    with pytest.raises(UserError, match="takes NAME=VALUE with NAME one of robust, clean"):
        Preference.parse("speed=3", ledger.campaign)
    with pytest.raises(UserError, match="has one objective"):
        Preference.parse("clean=0.9", ledger_of(tmp_path).campaign)


def test_weighted_objectives_give_one_score(tmp_path):
    ledger = ledger_of(tmp_path, {"objectives": {"robust_accuracy": 0.75, "clean_accuracy": 0.25}})
    closed(ledger, (0.6, 0.8))
    (only,) = candidates(ledger)
    assert only.score == pytest.approx(0.65)
    assert not ledger.campaign.pareto
