"""Campaign configuration, read from YAML: space, searcher, scheduler, budget, winners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from advtrain.documents import read_yaml
from advtrain.errors import UserError, nearest
from advtrain.recipe import Recipe, load_recipe, parse_override, set_path
from advtrain.recipe.explain import explain_all
from advtrain.schema import Config, Duration, Hours, Number
from tuning.space import Distribution, Space, check_space, with_settings

#: Metrics that can be objectives -> True if higher is better.
OBJECTIVES = {"robust_accuracy": True, "clean_accuracy": True, "robust_mae": False, "clean_mae": False}

Algorithm = Literal["random", "grid", "tpe", "cma-es", "nsga2", "pbt", "bohb"]


class SearchConfig(Config):
    """Search algorithm, which proposes points."""

    renamed = {
        "startup": "n_startup_trials",
        "quantile": "quantile_fraction",
        "resample": "resample_probability",
    }
    algorithm: Algorithm = "tpe"
    """random, grid, tpe (multivariate), cma-es (one objective, numbers only), nsga2, bohb (tpe that learns from the
    longest trainings it has, under hyperband), pbt (population-based training)"""
    seed: int = Field(default=0, ge=0)
    """seed of all random draws"""
    n_startup_trials: int | None = Field(default=None, ge=1)
    """tpe, bohb: number of random points before the model proposes; null: 8"""
    population: int | None = Field(default=None, ge=2)
    """cma-es, nsga2: points per generation; null: 4 + 3 ln(paths) for cma-es, 12 for nsga2"""
    points: int | None = Field(default=None, ge=2)
    """grid: number of values per continuous path; null: 3"""
    interval: int | None = Field(default=None, ge=1)
    """pbt: epochs between exploits; null: 2"""
    quantile_fraction: Number | None = Field(default=None, gt=0, le=0.5)
    """pbt: share of the population, at the bottom, that copies weights from the same share at the top; null: 0.25"""
    resample_probability: Number | None = Field(default=None, ge=0, le=1)
    """pbt: probability of a new random draw instead of a factor 0.8 or 1.2; null: 0.25"""

    @model_validator(mode="after")
    def _every_option_applies(self) -> Self:
        belongs = {
            "n_startup_trials": ("tpe", "bohb"),
            "population": ("cma-es", "nsga2"),
            "points": ("grid",),
            "interval": ("pbt",),
            "quantile_fraction": ("pbt",),
            "resample_probability": ("pbt",),
        }
        for name, algorithms in belongs.items():
            if getattr(self, name) is not None and self.algorithm not in algorithms:
                raise ValueError(f"{name} belongs to {' and '.join(algorithms)}, not to {self.algorithm}")
        return self


class SchedulerConfig(Config):
    """Scheduler, which stops trials early."""

    renamed = {"grace": "grace_period", "reduction": "reduction_factor"}
    kind: Literal["none", "asha", "hyperband", "median"] | None = None
    """none, asha (asynchronous successive halving), hyperband (asha in several brackets), median; null: none for
    pbt, hyperband for bohb, else asha"""
    grace_period: int | None = Field(default=None, ge=1)
    """epochs before a trial may be stopped; null: 1"""
    reduction_factor: int | None = Field(default=None, ge=2)
    """asha, hyperband: one trial in this many continues at each rung; null: 3"""

    @model_validator(mode="after")
    def _every_option_applies(self) -> Self:
        if self.kind == "none" and (self.grace_period is not None or self.reduction_factor is not None):
            raise ValueError("kind none stops no trial early; leave out grace_period and reduction_factor")
        if self.kind == "median" and self.reduction_factor is not None:
            raise ValueError("reduction_factor belongs to asha and hyperband, not to median")
        return self


class BudgetConfig(Config):
    """Limits of the search, which ends when the first one is reached."""

    trials: int = Field(ge=1)
    """number of trials; for pbt, the size of the population"""
    wall: Duration | None = Field(default=None, gt=0)
    """total time of all sessions, such as 2h, 90m, 45s or 1h30m; null: no limit"""
    gpu_hours: Hours | None = Field(default=None, gt=0)
    """GPU hours summed over all trials; null: no limit"""


class ConfirmConfig(Config):
    """Confirmation of the best trials with other seeds, which reveals lucky ones."""

    top: int = Field(default=2, ge=1)
    """number of trials to confirm"""
    seeds: int = Field(ge=1)
    """number of additional seeds per trial"""


class RegisterConfig(Config):
    """Evaluation of the winners on the test split, and their registration."""

    top: int = Field(default=1, ge=0)
    """number of models; with two objectives, the top of the Pareto front; 0: none"""
    suite: str | None = None
    """attacks that evaluate them; null: the recipe's evaluation attacks"""


class Campaign(Config):
    """Configuration of one search over a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")
    """name of the campaign and its folder; default: the file's name"""
    description: str = ""
    """one-line description"""
    recipe: str
    """name of a shipped recipe, or path of a YAML file"""
    base: dict[str, Any] = Field(default_factory=dict)
    """path -> value, applied to the recipe of every trial"""
    space: dict[str, Distribution] = Field(min_length=1)
    """path -> distribution"""
    objectives: dict[str, Literal["max", "min"] | Number] = Field(min_length=1)
    """validation metric -> max or min; two of them give a Pareto front; with weights instead of max, such as
    {robust_accuracy: 0.7, clean_accuracy: 0.3}, the weighted sum is optimized"""
    search: SearchConfig = SearchConfig()
    """search algorithm"""
    scheduler: SchedulerConfig = SchedulerConfig()
    """early stopping of trials"""
    budget: BudgetConfig
    """limits of the search"""
    max_failures: int = Field(default=2, ge=0)
    """number of times a trial resumes from its checkpoint after an error or a kill, before it counts as failed"""
    confirm: ConfirmConfig | None = None
    """confirmation of the best trials with other seeds; null: none"""
    winners: RegisterConfig = Field(default=RegisterConfig(), alias="register")
    """evaluation and registration of the winners"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, wanted in self.objectives.items():
            if name not in OBJECTIVES:
                raise ValueError(f"objectives: unknown figure '{name}'{nearest(name, OBJECTIVES)}")
            if isinstance(wanted, str) and (wanted == "max") != OBJECTIVES[name]:
                raise ValueError(
                    f"objectives.{name}: {'more' if OBJECTIVES[name] else 'less'} of it is better"
                )
            if not isinstance(wanted, str) and wanted <= 0:
                raise ValueError(f"objectives.{name}: a weight must be above 0 (got {wanted:g})")
        if len({isinstance(wanted, str) for wanted in self.objectives.values()}) > 1:
            raise ValueError("objectives: either all are max or min, or all have weights")
        if len({OBJECTIVES[name] for name in self.objectives}) > 1:
            raise ValueError("objectives: accuracies belong to a classification, mae to a regression")
        algorithm = self.search.algorithm
        if algorithm == "cma-es":
            if self.pareto:
                raise ValueError("cma-es searches one objective, or a weighted sum; use tpe or nsga2 for two")
            if any(d.choice for d in self.space.values()) or len(self.space) < 2:
                raise ValueError("cma-es searches two or more numbers, and no choice; use tpe")
        if algorithm == "pbt" and self.scheduler not in (SchedulerConfig(), SchedulerConfig(kind="none")):
            raise ValueError("pbt is its own scheduler; leave scheduler out")
        if algorithm == "bohb" and self.scheduler.kind not in (None, "hyperband"):
            raise ValueError("bohb is tpe under hyperband; leave scheduler.kind out")
        return self

    @property
    def pareto(self) -> bool:
        """True if there are several objectives and no weights, which gives a Pareto front."""
        return len(self.objectives) > 1 and all(isinstance(w, str) for w in self.objectives.values())

    @property
    def ended_by(self) -> SchedulerConfig:
        """Scheduler settings with the default kind filled in."""
        kinds = {"pbt": "none", "bohb": "hyperband"}
        kind = self.scheduler.kind or kinds.get(self.search.algorithm, "asha")
        return self.scheduler.model_copy(update={"kind": kind})

    def values(self, figures: dict[str, float]) -> list[float]:
        """Return the value of each objective, with signs such that higher is better."""
        return [(1 if OBJECTIVES[name] else -1) * figures[name] for name in self.objectives]

    def score(self, figures: dict[str, float]) -> float:
        """Return the ranking score, higher is better: the weighted sum, or the mean for a front."""
        weights = [1.0 / len(self.objectives) if isinstance(w, str) else w for w in self.objectives.values()]
        return sum(w * v for w, v in zip(weights, self.values(figures), strict=True))


@dataclass(frozen=True)
class Plan:
    """A campaign with its base recipe and a validated search space."""

    campaign: Campaign
    base: Recipe
    allow_code: bool = False

    @property
    def space(self) -> Space:
        """The search space."""
        return self.campaign.space


def load_campaign(
    path: Path,
    find_recipe: Callable[[str], Path],
    overrides: list[str],
    changes: dict[str, Any],
    *,
    allow_code: bool,
) -> Plan:
    """Read and check a campaign file.

    `overrides` are path=value settings of its recipe. `changes` are values at paths of the campaign itself.

    Raises:
        UserError: the file is missing or not YAML; a key, type, path or range is not allowed; or the space contains
            an invalid recipe.
    """
    values = read_yaml(path, "campaign")
    if not isinstance(values, dict):
        raise UserError(f"'{path}' must be a YAML mapping with the keys {', '.join(Campaign.model_fields)}")
    for place, value in changes.items():
        set_path(values, place, value)
    campaign = parse_campaign({"name": path.stem, **values}, str(path))
    recipe = load_recipe(find_recipe(campaign.recipe), allow_code=allow_code)
    settings = dict(campaign.base)
    if campaign.winners.suite is not None:
        settings |= {"evaluation.suite": campaign.winners.suite, "evaluation.attack": None}
    settings |= dict(parse_override(text) for text in overrides)
    base = with_settings(recipe, settings, f"{path}: base", allow_code=allow_code)
    return make_plan(campaign, base, str(path), allow_code=allow_code)


def make_plan(campaign: Campaign, base: Recipe, where: str, *, allow_code: bool) -> Plan:
    """Check a campaign against its base recipe, and return both as a plan."""
    try:
        check_space(campaign.space, base, allow_code=allow_code)
        _check_fit(campaign, base, allow_code=allow_code)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Plan(campaign, base, allow_code)


def _check_fit(campaign: Campaign, base: Recipe, *, allow_code: bool) -> None:
    """Raise UserError if the objectives, the space or the algorithm do not fit the recipe."""
    regression = base.objective.regression
    for name in campaign.objectives:
        if regression is not None and name.endswith("_mae") != regression:
            kind = "regression, evaluated by robust_mae and clean_mae" if regression else "classification"
            raise UserError(f"objectives: {name} does not apply; the recipe is a {kind}")
    scheduled = {path for change in base.training.changes for path in change.settings}
    for path in scheduled & set(campaign.space):
        raise UserError(
            f"space: '{path}' is also set by the recipe's training.changes; remove it from one of them"
        )
    if campaign.search.algorithm == "pbt":
        if base.training.changes:
            raise UserError("pbt makes its own training.changes; the recipe must have none")
        if base.training.num_workers != 0:
            raise UserError("pbt copies weights between trials in one process; set training.num_workers: 0")
        if base.training.epochs <= (campaign.search.interval or 2):
            raise UserError(
                f"pbt: training.epochs must be above search.interval (got {base.training.epochs} epochs)"
            )
        change = {path: d.value(d.extremes()[0]) for path, d in campaign.space.items()}
        try:
            with_settings(
                base, {"training.changes": [{"epoch": 1, "settings": change}]}, "pbt", allow_code=allow_code
            )
        except UserError as error:
            raise UserError(f"search.algorithm pbt: {error}") from error


def parse_campaign(values: dict[str, Any], where: str, *, stored: bool = False) -> Campaign:
    """Validate a mapping and return the campaign.

    Args:
        values: content of a campaign file.
        where: origin of the values in errors.
        stored: whether this project wrote the file; its times are numbers of seconds.
    """
    try:
        return Campaign.model_validate(values, context={"stored": stored})
    except ValidationError as error:
        raise UserError(explain_all(error.errors(), where, Campaign)) from error
