"""Benchmark a campaign against plain Ray Tune over TorchTrainer, and tpe against random search.

    python -m tests.benchmarks.bench_tune [--plain-trials 3] [--seeds 0]

The campaign runs 24 ASHA trials on scikit-learn's digits, cnn2, PGD-7, up to 9 epochs, on all available cores. The
overhead of a trial is (cores x wall time - training time) / trials. Plain Ray Tune runs the same training function on
one Ray Train worker, started from a Tune function as in Ray's guide. With --seeds N the script also compares tpe with
random search over N seeds of 24 trials: the best score, and the mean over trials of the best score so far.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from advtrain.cluster import start_ray, stop_ray
from advtrain.data import Dataset, load_data
from advtrain.environment import available_cores, describe_environment
from advtrain.recipe import Recipe, load_recipe
from advtrain.runs.folder import RunFolder
from tuning.campaign import Plan, make_plan, parse_campaign
from tuning.trials import Ledger, Trial

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "digits.yaml"
OVERRIDES = ["training.num_workers=0", "training.epochs=9", "optimizer.schedule.kind=constant"]
CAMPAIGN: dict[str, Any] = {
    "name": "bench",
    "recipe": "digits",
    "space": {
        "adversary.eps": {"uniform": [0.05, 0.2]},
        "optimizer.lr": {"loguniform": [1e-4, 2e-2]},
        "optimizer.beta1": {"uniform": [0.8, 0.99]},
        "optimizer.beta2": {"one_minus_loguniform": [1e-4, 1e-1]},
    },
    "objectives": {"robust_accuracy": "max"},
    "scheduler": {"kind": "asha", "grace_period": 1, "reduction_factor": 3},
    "budget": {"trials": 24},
}


class Clock:
    """Sum of the seconds that trials train."""

    def __init__(self) -> None:
        self.training = 0.0
        self.first: float | None = None

    def began(self, trial: Trial) -> None:
        """Nothing to do."""

    def on_result(self, trial: Trial, result: dict[str, Any]) -> None:
        """Add the time of an epoch and its validation."""
        self.training += result["time_this_iter_s"]
        self.first = self.first or time.perf_counter() - result["time_this_iter_s"]

    def ended(self, trial: Trial) -> None:
        """Nothing to do."""


def plan(algorithm: str, seed: int, scheduler: str = "asha") -> Plan:
    """Return the plan of the campaign with the given searcher."""
    values = CAMPAIGN | {"search": {"algorithm": algorithm, "seed": seed}}
    values["scheduler"] = {"kind": "none"} if scheduler == "none" else values["scheduler"]
    return make_plan(
        parse_campaign(values, "bench"), load_recipe(RECIPE, OVERRIDES), "bench", allow_code=False
    )


def campaign(folder: Path, chosen: Plan, data: Dataset) -> tuple[Ledger, Clock, float]:
    """Run the campaign; return its ledger, the clock of its training time and the wall seconds."""
    from tuning.runner import run_trials

    facts = {"environment": describe_environment(), "data_digest": data.digest}
    ledger, clock, started = Ledger.create(folder, chosen, facts), Clock(), time.perf_counter()
    run_trials(ledger, data, clock, None)
    return ledger, clock, time.perf_counter() - started


def plain(folder: Path, recipe: Recipe, data: Dataset, trials: int) -> float:
    """Run trials of plain Ray Tune one after another; return the overhead in seconds per trial."""
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    values, held = recipe.model_dump(mode="json", exclude_none=True), ray.put(data)

    def loop(config: dict[str, Any]) -> None:
        from advtrain.training import Session, run_worker

        run, mine = RunFolder(Path(config["run"])), Recipe.model_validate(values)
        run.path.mkdir(parents=True)
        begun = time.perf_counter()
        run_worker(mine, ray.get(held), run, Session())
        ray.train.report({"seconds": time.perf_counter() - begun})

    def trial(config: dict[str, Any]) -> None:
        name = ray.tune.get_context().get_trial_id()
        TorchTrainer(
            loop,
            train_loop_config={"run": str(folder / "runs" / name)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=name, storage_path=str(folder), callbacks=[TuneReportCallback()]),
        ).fit()

    tuner = tune.Tuner(
        tune.with_resources(trial, {"memory": 64 * 2**20}),
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder), verbose=0),
    )
    started = time.perf_counter()
    results = tuner.fit()
    seconds = time.perf_counter() - started
    return (seconds - sum(result.metrics["seconds"] for result in results)) / trials


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain-trials", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=0)
    arguments = parser.parse_args()
    cores = available_cores()
    # Without the dashboard, plain Tune over Train orphans placement groups of stopped trials: run one at a time.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "120"
    start_ray(None)
    recipe = load_recipe(RECIPE, OVERRIDES)
    data = load_data(recipe.data, Path())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger, clock, seconds = campaign(folder, plan("tpe", 0), data)
        assert clock.first is not None
        count = len(ledger.searched)
        overhead = (cores * seconds - clock.training) / count
        print(f"{count} asha trials on digits, {cores} cores: {seconds:.1f} s in all, with the actors' start")
        print(f"overhead of a trial: {overhead:.2f} s, the start of {cores} actors shared out")
        if arguments.plain_trials:
            slow = plain(folder, recipe, data, arguments.plain_trials)
            print(
                f"plain Ray Tune over TorchTrainer: {slow:.2f} s a trial, {slow / overhead:.0f} times as much"
            )
        if arguments.seeds:
            compare_searchers(folder, data, arguments.seeds)
    stop_ray()


def compare_searchers(folder: Path, data: Dataset, seeds: int) -> None:
    """Print the best score and the mean of the best score so far, for tpe and random search."""
    print(
        f"best validation robust accuracy of 24 trials trained to the end, and its mean so far, {seeds} seeds"
    )
    for algorithm in ("tpe", "random"):
        best, area = [], []
        for seed in range(seeds):
            ledger, _, _ = campaign(folder / f"{algorithm}-{seed}", plan(algorithm, seed, "none"), data)
            scores = [
                0.0 if t.disqualified() else (t.best() or {})["robust_accuracy"] for t in ledger.searched
            ]
            so_far = [max(scores[: n + 1]) for n in range(len(scores))]
            best.append(so_far[-1])
            area.append(fmean(so_far))
        shown = " ".join(f"{100 * value:.1f}" for value in best)
        print(f"{algorithm:7} best {100 * fmean(best):.2f} % ({shown}), so far {100 * fmean(area):.2f} %")


if __name__ == "__main__":
    main()
