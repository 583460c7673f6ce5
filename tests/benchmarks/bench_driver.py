"""Benchmark the driver of a campaign of many synthetic trials through Ray Tune.

    python -m tests.benchmarks.bench_driver [--trials 2000] [--algorithm tpe] [--objectives 2]

A trial writes the metrics of one epoch and ends, without training. The campaign's own work is measured for each trial:
the proposal, the folder of the trial, its end, and the ranking. The rest is Ray Tune's loop, whose time between two
ends of trials is printed too. Fails if the median of the last tenth of the trials is 50 ms or more.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

from advtrain.cluster import start_ray, stop_ray
from advtrain.data import load_data
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from tuning.campaign import Plan, make_plan, parse_campaign
from tuning.space import Point
from tuning.tracking import CampaignTracker
from tuning.trials import Ledger, Trial

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "digits.yaml"
#: Largest median of the driver's own work for a trial, in seconds.
LIMIT_S = 0.05


def plan_of(trials: int, algorithm: str, objectives: int) -> Plan:
    """Return the plan of a campaign of synthetic trials."""
    names = ("robust_accuracy", "clean_accuracy")[:objectives]
    values: dict[str, Any] = {
        "name": "driver",
        "recipe": "digits",
        "space": {
            "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
            "adversary.eps": {"uniform": [0.0, 0.3]},
            "optimizer.beta1": {"uniform": [0.8, 0.99]},
        },
        "objectives": dict.fromkeys(names, "max"),
        "search": {"algorithm": algorithm},
        "scheduler": {"kind": "none"},
        "budget": {"trials": trials},
    }
    recipe = load_recipe(RECIPE, ["training.num_workers=0", "training.epochs=1"])
    return make_plan(parse_campaign(values, "bench"), recipe, "bench", allow_code=False)


class SyntheticTrials:
    """Tune trainable that writes one epoch of random accuracies."""

    @staticmethod
    def trainable() -> type:
        """Return the class, which Tune subclasses."""
        from ray import tune

        class Synthetic(tune.Trainable):  # type: ignore[misc]
            def setup(self, config: dict[str, Any], **shared: Any) -> None:
                self.place, self.point = config["trial"]["run"], config["trial"]["point"]

            def reset_config(self, new_config: dict[str, Any]) -> bool:
                self.setup(new_config)
                return True

            def step(self) -> dict[str, Any]:
                robust, clean = accuracies(self.point)
                line = {"epoch": 1, "val_robust_accuracy": robust, "val_clean_accuracy": clean}
                RunFolder(Path(self.place)).append_metrics(line | {"epoch_seconds": 0.0})
                ended = {"done": True, "done_by_itself": True, "failure": "", "num_workers": 1}
                return {"epoch": 1, "score": robust, **ended}

        return Synthetic


def accuracies(point: Point) -> tuple[float, float]:
    """Return a robust and a clean accuracy of a point, with some noise."""
    noise = random.Random(str(point)).gauss(0, 0.02)
    robust = max(0.0, 0.7 - abs(point["adversary.eps"] - 0.15) - point["optimizer.lr"] + noise)
    return round(robust, 3), round(0.99 - point["adversary.eps"] + noise / 2, 3)


class Timed:
    """Processor time of the methods of the driver, for each trial; it leaves out waits for the disk."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.own: list[float] = []  # of each trial that ended
        self.ends: list[float] = []  # time of each end

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that adds its time."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started

        return timed

    def next_trial(self) -> None:
        """Start with the next trial."""
        self.own.append(self.seconds)
        self.ends.append(time.perf_counter())
        self.seconds = 0.0


def run(folder: Path, plan: Plan) -> tuple[Ledger, Timed]:
    """Run the campaign, with the tracker of a campaign whose MLflow runs do nothing."""
    from tuning import runner

    data, timed = load_data(plan.base.data, Path()), Timed()
    facts = {"status": "running", "environment": {}, "data_digest": data.digest}
    ledger = Ledger.create(folder, plan, facts)
    parent: Any = SimpleNamespace(log=lambda metrics, step: None, uri="none", run_id="none")
    tracker = CampaignTracker(ledger, data, parent)
    no_run = SimpleNamespace(sync=lambda: True, tick=lambda: None, pause=lambda: None)

    def ended(driver: Any, *args: Any, **info: Any) -> None:
        complete(driver, *args, **info)
        timed.next_trial()

    def no_mlflow(tracker: CampaignTracker, trial: Trial) -> Any:
        return no_run

    driver = runner._Driver
    complete = timed.wrap(driver.on_trial_complete)
    with (
        mock.patch.object(CampaignTracker, "tracker", no_mlflow),
        mock.patch.object(runner, "TrialTrainable", SyntheticTrials.trainable()),
        mock.patch.object(driver, "next_config", timed.wrap(driver.next_config)),
        mock.patch.object(driver, "on_trial_result", timed.wrap(driver.on_trial_result)),
        mock.patch.object(driver, "on_trial_complete", ended),
    ):
        runner.run_trials(ledger, data, tracker, None)
    return ledger, timed


def tenths(timed: Timed) -> list[tuple[float, float]]:
    """Return (own work, time between ends) of a trial in seconds, as medians of each tenth."""
    size = max(1, len(timed.own) // 10)
    gaps = [b - a for a, b in zip(timed.ends, timed.ends[1:], strict=False)]
    gaps = gaps[:1] + gaps
    starts = range(0, 10 * size, size)
    return [(median(timed.own[k : k + size]), median(gaps[k : k + size])) for k in starts if timed.own[k:]]


def main() -> None:
    """Print the time of a trial in each tenth of the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--algorithm", default="tpe")
    parser.add_argument("--objectives", type=int, choices=(1, 2), default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start_ray(None)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(arguments.trials, arguments.algorithm, arguments.objectives)
        ledger, timed = run(Path(name), plan)
    stop_ray()
    seconds = time.perf_counter() - started
    print(f"{len(ledger.searched)} trials by {arguments.algorithm} in {seconds:.0f} s")
    found = tenths(timed)
    for number, (own, gap) in enumerate(found, 1):
        work, between = f"{1000 * own:6.1f} ms of processor time a trial", f"{1000 * gap:6.1f} ms"
        print(f"tenth {number:2}: driver {work}, {between} between ends of trials")
    if found[-1][0] >= LIMIT_S:
        raise SystemExit(f"the driver spends {LIMIT_S * 1000:.0f} ms or more on a trial")


if __name__ == "__main__":
    main()
