"""The recipe: one YAML file that fully defines a training run. It nests the parts' configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from advtrain.attacks import REGRESSION_LOSSES, build_attack
from advtrain.data import DataConfig, Dataset
from advtrain.errors import UserError, nearest
from advtrain.models import ModelConfig
from advtrain.objective import ObjectiveConfig
from advtrain.optim import OptimizerConfig
from advtrain.recipe.paths import flattened, leaves, nested_values, override, parse_override, set_path
from advtrain.recipe.sections import (
    AdversaryConfig,
    EvaluationConfig,
    GuardConfig,
    TrainingConfig,
    why_not_sharded,
)
from advtrain.schema import Config, load_attribute, read_yaml, with_present_names
from advtrain.threat import rounded_radii

__all__ = ["AdversaryConfig", "EvaluationConfig", "GuardConfig", "Recipe", "TrainingConfig", "load_recipe"]


#: Settings of `training` that say where and how safely it runs, and shape no result.
_PLACEMENT = (
    "num_workers",
    "accelerator",
    "cpus_per_worker",
    "max_failures",
    "sharding",
    "timeout_s",
    "checkpoint_steps",
    "keep_checkpoints",
)
#: Paths that may name a user's code, as module:attribute.
_CODE_PATHS = ("model.name", "adversary.name", "objective.custom.function")
#: Paths of the optimizer that may change within a run: its state does not depend on them.
_MAY_CHANGE = (
    "optimizer.lr",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.momentum",
    "optimizer.clip_norm",
    "optimizer.clip_value",
    "optimizer.weight_decay",
    "optimizer.sam_rho",
    "optimizer.awp_gamma",
)


class Recipe(Config):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,80}$")
    """of runs, of the MLflow experiment and of the registered model"""
    description: str = ""
    """one line for `advtrain recipes`"""
    seed: int = Field(default=0, ge=0)
    """of initialisation, order, augmentation, attacks and dropout"""
    data: DataConfig
    """data set and splits"""
    model: ModelConfig
    """architecture"""
    adversary: AdversaryConfig
    """the attack trained against"""
    objective: ObjectiveConfig
    """weights of the loss terms"""
    optimizer: OptimizerConfig
    """optimizer, schedule, clipping, averaging"""
    training: TrainingConfig
    """the loop"""
    guard: GuardConfig = GuardConfig()
    """catastrophic overfitting"""
    evaluation: EvaluationConfig
    """the judge"""

    @model_validator(mode="after")
    def _fits_the_run(self) -> Self:
        for path, epochs in (
            ("optimizer.schedule.warmup_epochs", self.optimizer.schedule.warmup_epochs),
            ("adversary.eps_warmup_epochs", self.adversary.eps_warmup_epochs),
        ):
            if epochs >= self.training.epochs and epochs > 0:
                raise ValueError(
                    f"{path} = {epochs:g} leaves nothing of training.epochs = {self.training.epochs}"
                )
        if self.adversary.name == "free" and (self.optimizer.sam_rho or self.optimizer.awp_gamma):
            raise ValueError(
                "adversary.name free takes one pass for weights and input: no sam_rho, no awp_gamma"
            )
        used = self.objective.used.values()
        climbed = self.objective.uses_custom or any(term.adversarial and not term.distance for term in used)
        if self.adversary.name == "free" and not climbed:
            raise ValueError(
                "adversary.name free starts at the clean input, where every adversarial term here is flat; "
                "add one that is not, for example objective.adv_ce: 1"
            )
        if self.data.augment.resized_crop is not None and not self.data.stream:
            raise ValueError("data.augment.resized_crop needs data.stream: true")
        if self.training.sharding == "fsdp" and (reason := why_not_sharded(self)):
            raise ValueError(reason)
        self._check_losses()
        self._check_changes()
        return self

    def _check_changes(self) -> None:
        """Refuse settings of guard.stronger and training.changes that never come into force, or could not."""
        if self.guard.stronger and (self.guard.max_drop is None or not self.adversary.one_step):
            raise ValueError(
                "guard.stronger does nothing: the guard watches one-step attacks, with a max_drop"
            )
        entries = self.settings_to_come()
        for entry, change in entries.items():
            for path in change:
                if not path.startswith(("adversary.", "objective.")) and path not in _MAY_CHANGE:
                    raise ValueError(
                        f"{entry}: '{path}' cannot change within a run; adversary.*, "
                        f"objective.* and {', '.join(_MAY_CHANGE)} can"
                    )
        for entry, (epoch, count) in zip(
            entries,
            [(0, n) for n in range(1, len(self.guard.stronger) + 1)]
            + [(c.epoch, 0) for c in self.training.changes],
            strict=True,
        ):
            try:
                self.in_force(epoch, count)
            except ValidationError as error:
                raise ValueError(_explain(error.errors()[0], entry)) from error
            except UserError as error:
                raise ValueError(f"{entry}: {error}") from error

    def settings_to_come(self) -> dict[str, dict[str, Any]]:
        """Return the settings of guard.stronger and training.changes, by what to call them."""
        entries = {f"guard.stronger, entry {n}": change for n, change in enumerate(self.guard.stronger, 1)}
        changes = self.training.changes
        return entries | {f"training.changes, epoch {change.epoch}": change.settings for change in changes}

    def _check_losses(self) -> None:
        """Refuse attacks that climb a classification's loss in a regression, and the other way round."""
        regression = self.objective.regression
        attacks = {"evaluation.validation": self.evaluation.validation}
        if self.evaluation.attack is not None:
            attacks["evaluation.attack"] = self.evaluation.attack
        if self.objective.adversarial and self.adversary.name != "free" and not self.adversary.custom:
            attacks["adversary"] = self.adversary
        for path, attack in attacks.items():
            if regression is not None and (attack.loss in REGRESSION_LOSSES) != regression:
                kind, right = ("regression", "mae") if regression else ("classification", "ce")
                raise ValueError(f"{path}.loss = {attack.loss} does not suit a {kind}; set it to {right}")

    def written(self) -> dict[str, Any]:
        """Return every hyperparameter by its path, and the settings to come, as "training.changes, epoch 5: PATH"."""
        written = {path: value for path, value, _ in self.leaves()}
        for entry, change in self.settings_to_come().items():
            written |= {f"{entry}: {path}": value for path, value in flattened(change)}
        return written

    def until(self, epoch: int) -> Recipe:
        """Return the recipe without the changes that come into force at `epoch` or later."""
        changes = [change for change in self.training.changes if change.epoch < epoch]
        return self.model_copy(update={"training": self.training.model_copy(update={"changes": changes})})

    def in_force(self, epoch: int, recoveries: int) -> Recipe:
        """Return what is in force after `epoch` epochs and as many recoveries of the guard: training.changes that
        are due, and on top the first settings of guard.stronger."""
        due = [change.settings for change in self.until(epoch + 1).training.changes]
        if not due and not recoveries:
            return self
        values = self.values()
        for change in [*due, *self.guard.stronger[:recoveries]]:
            override(values, change)
        values["guard"]["stronger"] = values["training"]["changes"] = []
        return Recipe.model_validate(values)

    def check_data(self, dataset: Dataset) -> None:
        """Refuse, with a UserError, an objective that does not suit the data. Imports no code of the user's."""
        regression = self.objective.regression
        if regression is not None and regression != dataset.regression:
            have, want = ("targets", "classification") if dataset.regression else ("labels", "regression")
            raise UserError(
                f"{dataset.name} has {have}, but {', '.join(self.objective.used)} belongs to a {want}"
            )
        judge = self.evaluation.attack
        if dataset.regression and (judge is None or judge.loss not in REGRESSION_LOSSES):
            raise UserError(
                "a regression is judged by one attack on its error, not by a suite: "
                "evaluation.attack={loss: mae, num_steps: 50, num_restarts: 5}"
            )

    def check_code(self) -> None:
        """Import the user's code that training calls; a UserError if it is not there. Only where it may run."""
        if self.objective.custom is not None:
            load_attribute(self.objective.custom.function, "objective.custom.function")
        if self.adversary.custom:
            build_attack(self.adversary)

    def digest(self) -> str:
        """Return 64 hexadecimal digits over all that shapes the result: not names, places or worker counts."""
        values = self.model_dump(mode="json", exclude={"name": True, "description": True})
        for key in _PLACEMENT:
            del values["training"][key]
        if not values["training"]["changes"]:
            del values["training"]["changes"]  # as it was before there were any
        del values["data"]["download"]
        for attack in (
            values["adversary"],
            values["evaluation"]["attack"],
            values["evaluation"]["validation"],
        ):
            if attack is not None and not attack["args"]:
                del attack["args"]  # as it was before there were custom attacks
        values["objective"]["own"] = values["objective"].pop("custom")  # its name in earlier versions
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.values(), sort_keys=False)

    def values(self) -> dict[str, Any]:
        """Return nested plain values that give an equal recipe; null stands only where it is not the default."""
        return nested_values(self)

    def leaves(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (path, value, description) of every hyperparameter, in the recipe's order."""
        yield from leaves(self, "")

    def warnings(self, eight_bit: bool) -> list[str]:
        """Return remarks on values that are allowed but probably not meant."""
        remarks = []
        second = [name for name, term in self.objective.used.items() if term.gradient]
        if self.training.precision == "bf16" and second:
            remarks.append(
                f"{', '.join(second)} compare small differences, which bf16 blurs (llr_gap by half in a trial); "
                "training.precision: fp32 is exact"
            )
        if eight_bit:
            radii = {
                path: value for path, value in self.written().items() if path.endswith((".eps", ".eps_low"))
            }
            remarks += rounded_radii(radii)
        return remarks


def load_recipe(
    source: str | Path, overrides: list[str] | None = None, *, allow_code: bool = False
) -> Recipe:
    """Read a recipe from a YAML file and apply `path=value` overrides.

    Raises:
        UserError: no such file, no YAML, or a key, type or value that is not allowed, with its path.
    """
    values = read_yaml(Path(source), "recipe")
    if not isinstance(values, dict):
        raise UserError(f"'{source}' must be a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    return _with_overrides(values, overrides, source, allow_code)


def _with_overrides(
    values: dict[str, Any], overrides: list[str] | None, source: str | Path, allow_code: bool
) -> Recipe:
    for text in overrides or []:
        place, value = parse_override(text)
        try:
            set_path(values, place, value)
        except UserError as error:
            raise UserError(f"--set {text}: {error}") from error
    return parse_recipe(values, str(source), allow_code=allow_code)


def load_stored_recipe(
    source: Path, overrides: list[str] | None = None, *, allow_code: bool = False
) -> Recipe:
    """Read a recipe that this project wrote, perhaps in an earlier version: renamed keys are taken."""
    values = read_yaml(source, "recipe")
    if not isinstance(values, dict):
        raise UserError(f"'{source}' is damaged: it holds no mapping")
    return _with_overrides(with_present_names(values, Recipe), overrides, source, allow_code)


def parse_recipe(values: dict[str, Any], where: str, *, allow_code: bool = False) -> Recipe:
    """Check a mapping and return the recipe; `where` names its origin in errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, where) for e in error.errors())) from error
    foreign = {
        path: name
        for path, name in recipe.written().items()
        if path.endswith(_CODE_PATHS)
        and ":" in str(name)
        and not (path.endswith("model.name") and str(name).startswith("torchvision:"))
    }
    for path, name in foreign.items():
        if not allow_code:
            raise UserError(
                f"{where}: {path} '{name}' runs code that is not part of advtrain; add --allow-code if you trust it"
            )
    return recipe


def _explain(error: Any, where: str) -> str:
    """Turn one pydantic error into: file, path, what is wrong, what would be right."""
    location = [str(part) for part in error["loc"] if not str(part).startswith(("constrained", "list["))]
    path = ".".join(part for part in location if part not in ("int", "float"))
    if error["type"] == "extra_forbidden":
        fields = _fields_at(error["loc"][:-1])
        return f"{where}: unknown key '{path}'{nearest(str(error['loc'][-1]), fields)}"
    if error["type"] == "missing":
        return f"{where}: '{path}' is missing; it must be given"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    value = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{where}: '{path}': {message}{value}" if path else f"{where}: {message}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):  # the place in a list of what was found just before
            continue
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
