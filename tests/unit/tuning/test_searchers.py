"""Searchers: deterministic given the trials, within bounds, and better than random search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from statistics import fmean

import pytest

from advtrain.errors import UserError
from advtrain.recipe import load_stored_recipe
from tests.unit.tuning.surface import height, ledger_of, show
from tests.unit.tuning.synthetic import SyntheticLedger, campaign_of, measure, run_trial
from tuning.observations import Observations
from tuning.samplers import GENERATION
from tuning.searchers import Searcher
from tuning.trials import Ledger

TWO = {"objectives": {"robust_accuracy": "max", "clean_accuracy": "max"}}


def run(ledger: Ledger, count: int) -> list[float]:
    """Search the surface one trial at a time; return the scores in order."""
    found = []
    for _ in range(count):
        point, notes = Searcher(ledger.campaign).suggest(ledger.searched)
        trial = ledger.begin(point, notes)
        found.append(height(point))
        show(trial, (found[-1], 1 - found[-1] / 2))
        ledger.close(trial, "finished")
    return found


@pytest.mark.parametrize("algorithm", ["random", "tpe", "cma-es", "nsga2", "bohb", "pbt"])
def test_next_point_depends_only_on_trials_on_disk(algorithm, tmp_path):
    """A campaign read from disk, as after a kill, proposes the same next point."""
    extra = {"training.epochs=4"} if algorithm == "pbt" else set()
    changes = {"search": {"algorithm": algorithm, "seed": 3}, "scheduler": {}}
    ledger = ledger_of(tmp_path, changes, *extra)
    run(ledger, 14)
    again = Ledger.find(tmp_path, ledger.name, {})
    assert [t.point for t in again.searched] == [t.point for t in ledger.searched]
    found, wanted = (Searcher(each.campaign).suggest(each.searched) for each in (again, ledger))
    assert found == wanted
    for trial in ledger.searched:
        assert 1e-4 <= trial.point["optimizer.lr"] <= 1e-1
        assert 0 <= trial.point["adversary.eps"] <= 0.3


@pytest.mark.parametrize("algorithm", ["tpe", "cma-es"])
def test_searcher_beats_random_search(algorithm, tmp_path):
    """Over three seeds, the mean regret of the last ten proposals is less than half that of random search."""
    late = []
    for seed in range(3):
        ledger = ledger_of(tmp_path / str(seed), {"search": {"algorithm": algorithm, "seed": seed}})
        late += run(ledger, 40)[-10:]
    chance = run(ledger_of(tmp_path, {"search": {"algorithm": "random"}}), 40)
    assert 1 - fmean(late) < 0.5 * (1 - fmean(chance))


def test_nsga2_advances_generations_with_two_objectives(tmp_path):
    ledger = ledger_of(tmp_path, TWO | {"search": {"algorithm": "nsga2", "population": 5}})
    run(ledger, 16)
    generations = [value for trial in ledger.searched for value in trial.notes.values()]
    assert generations == sorted(generations)
    assert generations[-1] >= 2


def test_grid_search_ends_when_exhausted(tmp_path):
    ledger = ledger_of(tmp_path, {"search": {"algorithm": "grid", "points": 2}})
    run(ledger, 4)
    assert Searcher(ledger.campaign).suggest(ledger.searched) is None
    points = {tuple(trial.point.values()) for trial in ledger.searched}
    assert points == set(itertools.product((1e-4, 1e-1), (0.0, 0.3)))


@pytest.mark.parametrize(
    ("nodes", "bundle", "workers", "fits"),
    [
        ([{"CPU": 8.0}, {"CPU": 3.0}], {"CPU": 2.0}, 1, 5),
        ([{"CPU": 8.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2, 2),
        (
            [{"CPU": 64.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 8.0}, {"CPU": 32.0}],
            {"CPU": 2.0, "GPU": 1.0},
            1,
            4,
        ),
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 8.0}], {"CPU": 2.0, "GPU": 1.0}, 4, 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"CPU": 2.0}, 1, 0),
        ([{}], {"CPU": 1.0}, 1, 0),
    ],
)
def test_trials_that_fit_respects_node_resources(nodes, bundle, workers, fits):
    from tuning.concurrency import trials_that_fit

    assert trials_that_fit(nodes, bundle, workers) == fits


def test_observations_map_trial_status_to_optuna_state(tmp_path):
    ledger = ledger_of(tmp_path)
    for status in ("finished", "stopped", "failed", "running"):
        trial = ledger.begin({"optimizer.lr": 1e-2, "adversary.eps": 0.1}, {})
        show(trial, (0.5, 0.9), (0.6, 0.9))
        if status != "running":
            ledger.close(trial, status, "diverged" if status == "failed" else "")
    observations = Observations(ledger.campaign)
    observations.update(ledger.searched)
    finished, stopped, failed, running = observations.study.trials
    assert (finished.state.name, finished.value) == ("COMPLETE", 0.6)
    assert (stopped.state.name, stopped.intermediate_values) == ("PRUNED", {1: 0.5, 2: 0.6})
    assert (failed.state.name, failed.intermediate_values) == ("PRUNED", {})
    assert running.state.name == "RUNNING"


@pytest.mark.parametrize(
    ("is_local", "message"),
    [
        (True, "this machine does not have .* or name a larger cluster with --address"),
        (False, "not enough nodes of the cluster have .* or add nodes"),
    ],
)
def test_trial_that_never_fits_is_refused_with_a_remedy(tmp_path, monkeypatch, is_local, message):
    from tuning import concurrency

    monkeypatch.setattr(concurrency, "ray_is_local", lambda: is_local)
    monkeypatch.setattr(concurrency, "workers_take_gpus", lambda accelerator: False)
    monkeypatch.setattr(concurrency.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    ledger = ledger_of(tmp_path, {}, "training.cpus_per_worker=4")
    with pytest.raises(UserError, match=f"a trial needs 4 CPU, but {message}"):
        concurrency.TrialSlots(ledger).check(ledger.campaign)


SPACE = {
    "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
    "adversary.eps": {"uniform": [0.0, 0.3]},
    "adversary.num_steps": {"integer": [1, 9]},
    "optimizer.beta2": {"one_minus_loguniform": [1e-4, 1e-1]},
}
CHOICE = {"space": SPACE | {"optimizer.name": {"choice": ["sgd", "adam", "adamw"]}}}


def search_in_parallel(changes: dict, suggest: Callable, count: int) -> list[tuple]:
    """Search with four open trials, which end in any order and way; return the proposals."""
    ledger, generator, running, found = SyntheticLedger(campaign_of(changes)), random.Random(0), [], []
    while len(found) < count:
        if len(running) < 4:
            found.append(suggest(ledger)(ledger.searched))
            running.append(ledger.begin(*found[-1]))
            measure(running[-1], generator.choice((1, 2, 3)))
        else:
            trial = running.pop(generator.randrange(4))
            ledger.close(trial, generator.choice(("finished", "finished", "stopped", "failed")))
    return found


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("tpe", CHOICE),
        ("tpe", TWO),
        ("bohb", {"space": SPACE, "scheduler": {}}),
        ("nsga2", TWO | CHOICE),
        ("cma-es", {"space": SPACE}),
        ("grid", CHOICE),
        ("random", {}),
    ],
)
def test_kept_searcher_proposes_what_one_built_again_proposes(algorithm, changes):
    options = {"nsga2": {"population": 4}, "tpe": {"n_startup_trials": 4}}.get(algorithm, {})
    changes = changes | {"search": {"algorithm": algorithm} | options}
    kept = Searcher(campaign_of(changes))
    found = search_in_parallel(changes, lambda ledger: kept.suggest, 50)
    assert found == search_in_parallel(changes, lambda ledger: Searcher(ledger.campaign).suggest, 50)


def test_point_that_no_trial_took_does_not_count():
    ledger = SyntheticLedger(campaign_of())
    for seed in range(10):
        run_trial(ledger, random.Random(seed))
    searcher = Searcher(ledger.campaign)
    proposed = searcher.suggest(ledger.searched)
    assert searcher.suggest(ledger.searched) == proposed
    run_trial(ledger, random.Random(10))
    assert searcher.suggest(ledger.searched) == Searcher(ledger.campaign).suggest(ledger.searched)


@pytest.mark.parametrize(
    ("algorithm", "count"),
    [(name, count) for name in ("tpe", "cma-es", "nsga2") for count in (100, 1_000)] + [("nsga2", 10_000)],
)
def test_searcher_reads_each_ended_trial_once(algorithm, count):
    """NSGA-II of 10,000 trials has 833 generations, more than a recursion over them may have."""
    two = TWO if algorithm == "nsga2" else {}
    ledger, generator = (
        SyntheticLedger(campaign_of(two | {"search": {"algorithm": algorithm}})),
        random.Random(0),
    )
    for number in range(count):
        trial = run_trial(ledger, generator)
        trial.notes = {GENERATION: number // 12} if algorithm == "nsga2" else {}
    searcher, size = Searcher(ledger.campaign), 6  # cma-es reads whole generations
    for added in range(12):
        before = ledger.reads.metrics
        proposed = searcher.suggest(ledger.searched)
        assert ledger.reads.metrics - before <= (size if added else count)
        trial = ledger.begin(*proposed)
        measure(trial)
        ledger.close(trial)
    assert count + 11 - size < ledger.reads.metrics <= count + 11


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
@pytest.mark.parametrize("algorithm", ["tpe", "nsga2", "random"])
def test_frozen_blocks_and_layer_decay_are_searched(algorithm, tmp_path):
    """A choice may have a word, a list and null as values."""
    freeze = ["backbone", ["0.0", "0.2"], None]
    space = {
        "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
        "adversary.eps": {"uniform": [0.0, 0.3]},
        "optimizer.layer_decay": {"uniform": [0.5, 1.0]},
        "model.freeze": {"choice": freeze},
    }
    ledger = ledger_of(tmp_path, {"space": space, "search": {"algorithm": algorithm}})
    run(ledger, 15)
    recipes = [load_stored_recipe(trial.run.path / "recipe.yaml") for trial in ledger.searched]
    assert [recipe.model.freeze for recipe in recipes] == [t.point["model.freeze"] for t in ledger.searched]
    assert {str(recipe.model.freeze) for recipe in recipes} == set(map(str, freeze))
    assert all(0.5 <= recipe.optimizer.layer_decay <= 1 for recipe in recipes)
