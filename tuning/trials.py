"""Campaign folder: holds the whole state of a campaign and its trials.

runs/mnist-tpe-3f2a9c-1/
  campaign.yaml     the campaign
  recipe.yaml       the resolved recipe that trials vary
  campaign.json     status, MLflow run, data digest, time spent
  trials/NAME-t000/ a run folder for each trial (advtrain/runs/folder.py); run.json has the proposal under "trial"
  start/            weights that trials start from, see advtrain/runs/start.py
  tune/             Ray Tune's own files, which nothing here reads
  report/           report.html, report.md, trials.json, figures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from advtrain.data import Dataset
from advtrain.data.texts import TOKENIZER
from advtrain.documents import read_record, read_yaml
from advtrain.errors import UserError, nearest
from advtrain.recipe import Recipe, load_stored_recipe, set_path
from advtrain.runs.checkpoint import robustness
from advtrain.runs.folder import RunFolder, exists_remotely, run_lock, sync, write_atomically
from advtrain.runs.leaks import write_rows
from advtrain.runs.sealed import sealed_json, unsealed
from advtrain.runs.start import ResolvedWeights, save_weights, saved_weights
from advtrain.schema import with_present_names
from advtrain.training.start import RunStart, prepare_start
from advtrain.user_paths import user_path
from tuning.campaign import Campaign, Plan, make_plan, parse_campaign
from tuning.space import Point, settings, with_settings

#: Drop of the validation robust accuracy, from its best to its last value, that disqualifies a trial. It applies to
#: every training attack; the guard watches one-step attacks only.
COLLAPSE = 0.2


@dataclass
class Trial:
    """One training run of a campaign."""

    run: RunFolder
    number: int
    point: Point
    notes: dict[str, Any]  # data that the searcher stores with the trial, such as its generation
    seed: int | None = None  # for a confirmation: its seed
    of: int | None = None  # for a confirmation: number of the trial that it repeats
    status: str = "running"  # running, finished, stopped (by the scheduler or the budget) or failed
    message: str = ""
    closed: int | None = None  # position in the order in which trials ended
    broken: str = ""  # why its result on the test split cannot be trusted

    @property
    def label(self) -> str:
        """Short name: t007, and t007-s1 for its confirmation with seed 1."""
        return f"t{self.number:03d}" if self.of is None else f"t{self.of:03d}-s{self.seed}"

    def lines(self) -> list[dict[str, Any]]:
        """Return the epoch number and metrics (see `figures_of`) of each validated epoch."""
        lines = [{"epoch": line["epoch"], **figures_of(line)} for line in self.run.metrics()]
        return [line for line in lines if len(line) > 1]

    def best(self) -> dict[str, Any] | None:
        """Return the metrics of the epoch with the best robust validation metric, or None.

        The latest epoch wins a tie.
        """
        return _best(self.lines())

    def disqualified(self) -> str:
        """Return why the trial cannot win; "" if it can."""
        return self.outcome().reason

    def outcome(self) -> Outcome:
        """Read the files of the trial once; return its epochs, or why it cannot win."""
        if self.status == "failed" or self.broken:
            return Outcome(self.broken or self.message or "failed")
        if self.run.recoveries():
            return Outcome("the guard detected catastrophic overfitting")
        lines = self.lines()
        robust = [line["robust_accuracy"] for line in lines if "robust_accuracy" in line]
        if robust and max(robust) - robust[-1] > COLLAPSE:
            return Outcome(
                f"robust accuracy collapsed from {100 * max(robust):.1f} to {100 * robust[-1]:.1f} %"
            )
        return Outcome("", lines, _best(lines)) if lines else Outcome("never validated")


@dataclass(frozen=True)
class Outcome:
    """Result of a trial, as its files had it when they were read."""

    reason: str  # why the trial cannot win; "" if it can
    lines: list[dict[str, Any]] = field(default_factory=list)  # see `Trial.lines`; empty with a reason
    best: dict[str, Any] | None = None  # see `Trial.best`; None with a reason


def _best(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    return max(lines, key=lambda line: (_robust(line), line["epoch"]), default=None)


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """Return an epoch's clean and robust validation metrics.

    They are those of the weights or of their average, whichever is more robust and therefore kept.
    """
    weights = "average_" if robustness(line, "average_") > robustness(line) else ""
    names = ("robust_accuracy", "clean_accuracy", "robust_mae", "clean_mae")
    return {
        name: line[f"val_{weights}{name}"] for name in names if line.get(f"val_{weights}{name}") is not None
    }


def _robust(figures: dict[str, Any]) -> float:
    return float(figures["robust_accuracy"] if "robust_accuracy" in figures else -figures["robust_mae"])


class Ledger:
    """All trials of one campaign, written only by the driver that holds the lock."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder.resolve(), plan
        sync(self.folder)
        found = [_read(path) for path in (self.folder / "trials").glob("*/run.json")]
        found.sort(key=lambda trial: (trial.number, trial.seed or 0))
        #: Trials that the searcher proposed, in order of proposal.
        self.searched = [trial for trial in found if trial.of is None]
        #: Trials that repeat another one, by its number and their seed.
        self.confirmations = {(trial.of, trial.seed): trial for trial in found if trial.of is not None}
        #: Number of trials that ended.
        self.ended = sum(trial.closed is not None for trial in found)

    @classmethod
    def create(
        cls,
        parent: Path,
        plan: Plan,
        facts: dict[str, Any],
        weights: Mapping[str, ResolvedWeights] | None = None,
        dataset: Dataset | None = None,
    ) -> Ledger:
        """Create `parent/NAME-DIGEST6-K` with the first free K; K counts identical campaigns.

        `weights` are those that its trials start from, by their reference. The samples of `dataset` are recorded once
        for all trials.
        """
        values = plan.campaign.model_dump(mode="json", by_alias=True, exclude_none=True)
        same = json.dumps([values, plan.base.digest()], sort_keys=True).encode()
        digest = hashlib.sha256(same).hexdigest()[:6]
        for k in range(1, 10_000):
            folder = parent / f"{plan.campaign.name}-{digest}-{k}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"cannot write below '{parent}': {error.strerror}; choose another place with --runs"
                ) from error
            if exists_remotely(folder / "campaign.json"):  # created by another machine in the meantime
                continue
            write_atomically(folder / "campaign.yaml", yaml.safe_dump(values, sort_keys=False))
            write_atomically(folder / "recipe.yaml", plan.base.to_yaml())
            save_weights(folder, weights or {})
            if dataset is not None:
                write_rows(folder / "rows", dataset)
            if dataset is not None and dataset.text is not None:
                write_atomically(folder / TOKENIZER, dataset.text.tokenizer)
            write_atomically(folder / "campaign.json", sealed_json({"spent": {}, **facts}))
            return cls(folder, plan)
        raise UserError(f"'{parent}' already has 9,999 copies of this campaign; move some, or change --runs")

    @classmethod
    def find(cls, parent: Path, name: str, changes: dict[str, Any], *, allow_code: bool = False) -> Ledger:
        """Open the campaign with the given name or path, and apply `changes` (path -> value).

        Args:
            allow_code: whether its recipe may name user code.

        Raises:
            UserError: there is no such campaign, or one of its files is damaged.
        """
        places = (parent / name, user_path(name, "campaign"))
        folder = next((p for p in places if (p / "campaign.json").is_file()), None)
        if folder is not None:
            sync(folder)
        if folder is None:
            known = [p.name for p in parent.glob("*/") if (p / "campaign.json").is_file()]
            raise UserError(
                f"no campaign '{name}' in '{parent}'{nearest(name, known) if known else '; there are no campaigns'}"
            )
        try:
            campaign = _changed(folder, changes)
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            raise UserError(f"cannot read campaign.yaml in '{folder}': {error}") from error
        base = load_stored_recipe(folder / "recipe.yaml", allow_code=allow_code)
        return cls(folder, make_plan(campaign, base, str(folder / "campaign.yaml"), allow_code=allow_code))

    @property
    def campaign(self) -> Campaign:
        """The campaign."""
        return self.plan.campaign

    @property
    def name(self) -> str:
        """Name of the campaign's folder, which identifies the campaign."""
        return self.folder.name

    def locked(self) -> Any:
        """Lock the campaign for this process; wait at most 10 seconds for the lock."""
        return run_lock(self.folder, f"campaign '{self.name}' is in use by another process", 10)

    def facts(self) -> dict[str, Any]:
        """Return the content of campaign.json."""
        try:
            return unsealed(
                read_record(self.folder / "campaign.json", "status", "environment", "data_digest")
            )
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.folder / 'campaign.json'}' is unreadable: {error}") from error

    def update(self, **changes: Any) -> None:
        """Change entries of campaign.json."""
        write_atomically(self.folder / "campaign.json", sealed_json(self.facts() | changes))

    def move_data(self, path: str) -> None:
        """Record another path of the data, for the campaign and its trials."""
        self.update(data_path=path)
        for trial in self.trials:
            if trial.run.facts().get("data_path") != path:
                trial.run.update(data_path=path)

    def over_budget(self, spent: dict[str, float]) -> bool:
        """Return whether seconds spent, as `wall` time and on GPUs (`gpu`), use up the budget."""
        budget = self.campaign.budget
        return (budget.wall is not None and spent.get("wall", 0.0) >= budget.wall) or (
            budget.gpu_hours is not None and spent.get("gpu", 0.0) / 3600 >= budget.gpu_hours
        )

    @property
    def trials(self) -> list[Trial]:
        """All trials, the confirmations last."""
        return [*self.searched, *self.confirmations.values()]

    def begin(
        self,
        point: Point,
        notes: dict[str, Any],
        *,
        of: Trial | None = None,
        seed: int | None = None,
        dataset: Dataset | None = None,
    ) -> Trial:
        """Create the folder of a new trial.

        Once its run.json exists, the trial will be trained, even after a crash. `dataset`, the campaign's data, is
        needed if the trial starts from weights, trains on texts, or has a radius relative to its embeddings.
        """
        number = len(self.searched) if of is None else of.number
        trial = Trial(RunFolder(Path()), number, point, notes, seed, of.number if of is not None else None)
        trial.run = RunFolder(self.folder / "trials" / f"{self.name}-{trial.label}")
        recipe = self.recipe(trial)
        trial.run.path.mkdir(parents=True, exist_ok=True)  # a kill may have left it empty
        proposed = {"number": number, "point": point, "notes": notes, "seed": seed, "of": trial.of}
        kept = ("environment", "data_digest", "data_path")
        shared = {key: value for key, value in self.facts().items() if key in kept}
        first = {"status": "running", "trained": False, **shared, "trial": proposed}
        start = RunStart(recipe)
        if dataset is not None:
            start = prepare_start(recipe, dataset, partial(saved_weights, self.folder))
        trial.run.begin(start.recipe.to_yaml(), first, start.write)
        if trial.of is None:
            self.searched.append(trial)
        else:
            self.confirmations[trial.of, trial.seed] = trial
        return trial

    def recipe(self, trial: Trial) -> Recipe:
        """Return the recipe of a new trial.

        A confirmation trains the recipe of the trial `trial.of` again with another seed.
        """
        allow_code = self.plan.allow_code
        if trial.of is None:
            return with_settings(
                self.plan.base, settings(self.plan.space, trial.point), trial.label, allow_code=allow_code
            )
        confirmed = self.searched[trial.of]
        base = load_stored_recipe(confirmed.run.path / "recipe.yaml", allow_code=allow_code)
        return with_settings(base, {"seed": trial.seed}, trial.label, allow_code=allow_code)

    def point(self, trial: Trial) -> Point:
        """Return a trial's current point, after the last change by population-based training."""
        if self.campaign.search.algorithm != "pbt":
            return trial.point
        recipe = load_stored_recipe(trial.run.path / "recipe.yaml", allow_code=self.plan.allow_code)
        if not recipe.training.changes:
            return trial.point
        latest = recipe.training.changes[-1].settings
        return trial.point | {
            path: d.raw(latest[path]) for path, d in self.plan.space.items() if path in latest
        }

    def disqualify(self, trial: Trial, reason: str) -> None:
        """Record why a trial's result cannot be trusted."""
        trial.broken = reason
        trial.run.update(trial=trial.run.facts()["trial"] | {"broken": reason})

    def close(self, trial: Trial, status: str, message: str = "") -> None:
        """Record how a trial ended."""
        trial.status, trial.message = status, message
        trial.closed = self.ended
        self.ended += 1
        proposed = trial.run.facts()["trial"] | {"closed": trial.closed}
        trial.run.update(status=status, message=message, trained=status != "failed", trial=proposed)


def _changed(folder: Path, changes: dict[str, Any]) -> Campaign:
    """Return the campaign with `changes` applied, and save them in campaign.yaml."""
    values = with_present_names(read_yaml(folder / "campaign.yaml", "campaign"), Campaign)
    for path, value in changes.items():
        set_path(values, path, value)
    campaign = parse_campaign(values, str(folder / "campaign.yaml"), stored=True)
    if changes:
        write_atomically(folder / "campaign.yaml", yaml.safe_dump(values, sort_keys=False))
    return campaign


def _read(file: Path) -> Trial:
    run = RunFolder(file.parent)
    facts = run.facts()
    proposed = dict(facts["trial"])
    return Trial(run=run, status=facts["status"], message=facts.get("message", ""), **proposed)
