"""Ray Tune trainable: trains a trial, one validated epoch per step, from its run folder."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray import tune

from advtrain.cluster import limit_threads
from advtrain.data import Dataset
from advtrain.documents import read_yaml
from advtrain.environment import tune_malloc
from advtrain.errors import UserError
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.runs.folder import RunFolder, write_atomically
from advtrain.runs.storage import opened
from advtrain.training import Epochs, launch_epochs
from tuning.campaign import Campaign
from tuning.space import Point, settings
from tuning.trials import figures_of

#: Files that population-based training copies from trial to trial, in addition to the checkpoints.
_HISTORY = ("recipe.yaml", "metrics.jsonl", "guard.json")


class TrialTrainable(tune.Trainable):  # type: ignore[misc]
    """Trainable that runs one trial after another in the same actor.

    A trial that trains in one process therefore starts no new process. The config is
    {"trial": {"run": location of the run folder, "point": current point}}.
    """

    def setup(
        self, config: dict[str, Any], *, campaign: Campaign, dataset: list[Any], allow_code: bool
    ) -> None:
        """Store the arguments that all trials share, and open the first trial.

        `dataset` holds the reference of the data in Ray's store.
        """
        tune_malloc()
        self.campaign, self.allow_code = campaign, allow_code
        self.dataset: Dataset = ray.get(dataset[0])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Close the current trial and open the next one."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.holds = ExitStack()
        self.place = config["trial"]["run"]
        self.run_folder = RunFolder(self.holds.enter_context(opened(self.place, watched=("stop",))))
        self.point: Point = config["trial"]["point"]
        self.training: Epochs | None = None

    def step(self) -> dict[str, Any]:
        """Train up to the next validated epoch; return its metrics and whether training ended."""
        try:
            if self.training is None:
                (self.run_folder.path / "error.txt").unlink(missing_ok=True)  # left by an earlier attempt
                # The worker of a killed driver exits, and releases its lock, a little later.
                self.holds.enter_context(self.run_folder.locked(wait_s=60))
                finish_taking_over(self.run_folder)
                self.recipe = load_stored_recipe(
                    self.run_folder.path / "recipe.yaml", allow_code=self.allow_code
                )
                limit_threads(self.recipe.training.cpus_per_worker)
                self.training = launch_epochs(self.recipe, self.dataset, self.run_folder)
            while True:
                line = next(self.training)
                if figures_of(line) and line["epoch"] < self.recipe.training.epochs:
                    return self._result(line, done=False)
        except StopIteration as ended:
            lines = [line for line in self.run_folder.metrics() if figures_of(line)]
            failure = ended.value.message if ended.value.status == "failed" else ""
            return self._result(lines[-1] if lines else {}, done=True, failure=failure)
        except Exception as error:
            if not isinstance(error, UserError):  # Tune retries; the driver cannot see the error itself
                write_atomically(self.run_folder.path / "error.txt", f"{type(error).__name__}: {error}")
                raise
            # A UserError repeats at each attempt, so Tune must not retry.
            return self._result({}, done=True, failure=str(error))

    def _result(self, line: dict[str, Any], *, done: bool, failure: str = "") -> dict[str, Any]:
        self.run_folder.fetch(whole=False)  # the driver reads the folder when it gets this result
        figures = figures_of(line)
        worst = 0.0 if any(name.endswith("accuracy") for name in self.campaign.objectives) else -1e9
        score = self.campaign.score(figures) if figures and not failure else worst
        return {
            "epoch": line.get("epoch", 0),
            "score": score,
            "done": done,
            "done_by_itself": done,
            "failure": failure,
            "num_workers": line.get("num_workers", 1),
            **figures,
        }

    def cleanup(self) -> None:
        """Stop training, and release the run folder and its lock."""
        if self.training is not None:
            self.training.close()
            self.training = None
        self.holds.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the files that another trial needs to continue from here."""
        source, target = self.run_folder, Path(checkpoint_dir)
        for name in _HISTORY:
            if (source.path / name).exists():
                shutil.copy2(source.path / name, target / name)
        shutil.copytree(source.checkpoints, target / "checkpoints", ignore=shutil.ignore_patterns(".*"))
        epoch = len(source.metrics())
        write_atomically(target / "trial.json", json.dumps({"run": self.place, "epoch": epoch}))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue from the trial's own weights, or from another trial's with new settings.

        The trial's own weights are already in its run folder. For another trial's weights, this trial's settings apply.
        """
        source = Path(checkpoint_dir)
        facts = json.loads((source / "trial.json").read_text())
        if facts["run"] != self.place:
            self._take_over(source, facts["epoch"], Path(facts["run"]).name)

    def _take_over(self, source: Path, epoch: int, donor: str) -> None:
        """Replace the content of the run folder by the donor's.

        The recipe becomes the donor's with a change at `epoch`, so training it again gives the same weights. Files
        are replaced one by one. After a kill, `incoming/ready` marks that `finish_taking_over` must finish the move.
        """
        values = read_yaml(source / "recipe.yaml", "recipe")
        values["name"] = load_stored_recipe(
            self.run_folder.path / "recipe.yaml", allow_code=self.allow_code
        ).name
        changes = values["training"].setdefault("changes", [])
        changes.append({"epoch": epoch, "settings": settings(self.campaign.space, self.point)})
        recipe = Recipe.model_validate(values)
        incoming = self.run_folder.path / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.copytree(source, incoming)
        write_atomically(incoming / "recipe.yaml", recipe.to_yaml())
        write_atomically(incoming / "ready", donor)
        finish_taking_over(self.run_folder)


def finish_taking_over(run: RunFolder) -> None:
    """Move the files in `incoming` into place, also after a kill during an earlier move."""
    incoming = run.path / "incoming"
    if not (incoming / "ready").exists():
        shutil.rmtree(incoming, ignore_errors=True)
        return
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    shutil.copytree(incoming / "checkpoints", run.checkpoints)
    for name in _HISTORY:
        if (incoming / name).exists():
            write_atomically(run.path / name, (incoming / name).read_text())
        else:
            (run.path / name).unlink(missing_ok=True)
    (incoming / "ready").unlink()
    shutil.rmtree(incoming, ignore_errors=True)
