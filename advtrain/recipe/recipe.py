"""Recipe: the YAML file that fully defines a training run, one section per component."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from advtrain.documents import read_yaml
from advtrain.errors import UserError
from advtrain.hub import is_pretrained
from advtrain.recipe.attack import REGRESSION_LOSSES
from advtrain.recipe.data import TEXT_SOURCES, DataConfig
from advtrain.recipe.digest import digest_of
from advtrain.recipe.edit_attack import why_no_edits
from advtrain.recipe.explain import explain, explain_all
from advtrain.recipe.lengths import is_length
from advtrain.recipe.model import ModelConfig, runs_code
from advtrain.recipe.objective import ObjectiveConfig, why_no_reference
from advtrain.recipe.optimizer import OptimizerConfig
from advtrain.recipe.paths import flattened, leaves, nested_values, override, set_overrides
from advtrain.recipe.sections import (
    AdversaryConfig,
    EvaluationConfig,
    GuardConfig,
    TrainingConfig,
    rounded_radii,
    why_not_sharded,
)
from advtrain.schema import Config, parse_relative, with_present_names

__all__ = ["AdversaryConfig", "EvaluationConfig", "GuardConfig", "Recipe", "TrainingConfig", "load_recipe"]


#: Start of the last line of a stored recipe, before the digest of the lines above it.
_SEAL = "# digest: "
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
    """Complete definition of a training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,80}$")
    """name of the runs, the MLflow experiment and the registered model"""
    description: str = ""
    """one-line summary that `advtrain recipes` prints"""
    seed: int = Field(default=0, ge=0)
    """seed of initialization, data order, augmentation, attacks and dropout"""
    data: DataConfig
    """data set and splits"""
    model: ModelConfig
    """architecture"""
    adversary: AdversaryConfig
    """training attack"""
    objective: ObjectiveConfig
    """weights of the loss terms"""
    optimizer: OptimizerConfig
    """optimizer, schedule, clipping, averaging"""
    training: TrainingConfig
    """training loop and workers"""
    guard: GuardConfig = GuardConfig()
    """guard against catastrophic overfitting"""
    evaluation: EvaluationConfig
    """evaluation threat model and attacks"""

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, given: Any) -> Any:
        """Set data.tokenizer to that of a pretrained network, unless the recipe names another."""
        if not isinstance(given, dict):
            return given
        data, model = given.get("data"), given.get("model")
        if not isinstance(data, dict) or not isinstance(model, dict) or data.get("tokenizer") is not None:
            return given
        name = model.get("name")
        if isinstance(name, str) and is_pretrained(name) and data.get("source") in TEXT_SOURCES:
            return {**given, "data": {**data, "tokenizer": name}}
        return given

    @model_validator(mode="after")
    def _fits_the_run(self, info: ValidationInfo) -> Self:
        for path, epochs in (
            ("optimizer.schedule.warmup_epochs", self.optimizer.schedule.warmup_epochs),
            ("adversary.eps_warmup_epochs", self.adversary.eps_warmup_epochs),
            ("adversary.eps_delay_epochs + eps_warmup_epochs", self.adversary.epochs_to_full_eps),
            ("model.unfreeze_epoch", self.model.unfreeze_epoch or 0),
        ):
            if epochs >= self.training.epochs and epochs > 0:
                raise ValueError(
                    f"{path} = {epochs:g} must be below training.epochs = {self.training.epochs}"
                )
        self._check_climber()
        if reason := why_no_edits(self):
            raise ValueError(reason)
        if self.data.augment.resized_crop is not None and not self.data.stream:
            raise ValueError("data.augment.resized_crop needs data.stream: true")
        if self.training.sharding == "fsdp" and (reason := why_not_sharded(self)):
            raise ValueError(reason)
        if reason := why_no_reference(self, may_idle=bool(info.context and info.context.get("in_force"))):
            raise ValueError(reason)
        in_force = info.context and info.context.get("in_force")
        if self.adversary.embedding_norm is not None and not self.relative_lengths and not in_force:
            raise ValueError(
                "adversary.embedding_norm does nothing without a relative length, such as eps: 0.5x"
            )
        self._check_losses()
        self._check_changes()
        return self

    def _check_climber(self) -> None:
        """Raise if an attack that ascends on the objective itself does not suit the recipe."""
        name, optimizer = self.adversary.name, self.optimizer
        if not self.adversary.climbs_objective:
            return
        if optimizer.sam_rho or optimizer.awp_gamma:
            raise ValueError(
                f"adversary.name {name} differentiates by weights and input in one pass; unset sam_rho and awp_gamma"
            )
        used = self.objective.used.values()
        climbed = self.objective.uses_custom or any(term.adversarial and not term.distance for term in used)
        if self.adversary.start == "none" and not climbed and (name == "free" or self.objective.adversarial):
            how = "" if name == "free" else "set adversary.start: uniform, or "
            raise ValueError(
                f"adversary.name {name} starts at the clean input, where every adversarial term used has zero "
                f"gradient; {how}add another term, for example objective.adv_ce: 1"
            )

    def _check_changes(self) -> None:
        """Raise if a setting of guard.stronger or training.changes has no effect or is invalid."""
        if self.guard.stronger and (self.guard.max_drop is None or not self.adversary.one_step):
            raise ValueError(
                "guard.stronger does nothing: the guard needs a one-step attack and guard.max_drop"
            )
        entries = self.settings_to_come()
        for entry, change in entries.items():
            for path in change:
                fixed = path.startswith("objective.teacher")
                if fixed or not path.startswith(("adversary.", "objective.")) and path not in _MAY_CHANGE:
                    raise ValueError(
                        f"{entry}: '{path}' cannot change within a run; adversary.*, objective.* except the "
                        f"teacher, and {', '.join(_MAY_CHANGE)} can"
                    )
        for entry, (epoch, count) in zip(
            entries,
            [(0, n) for n in range(1, len(self.guard.stronger) + 1)]
            + [(c.epoch, 0) for c in self.training.changes],
            strict=True,
        ):
            try:
                table = self.in_force(epoch, count).adversary.table
            except ValidationError as error:
                raise ValueError(explain(error.errors()[0], entry, Recipe)) from error
            except UserError as error:
                raise ValueError(f"{entry}: {error}") from error
            if table not in (None, self.adversary.table):
                raise ValueError(f"{entry}: adversary.table cannot change within a run (now {table})")

    @property
    def relative_lengths(self) -> list[str]:
        """Settings of the adversary such as `adversary.eps = 0.5x`, including later changes."""
        found = {path: value for path, value in self.written().items() if parse_relative(value) is not None}
        return [f"{path} = {value}" for path, value in found.items() if is_length(path.rpartition(": ")[2])]

    def settings_to_come(self) -> dict[str, dict[str, Any]]:
        """Return the settings of guard.stronger and training.changes, keyed by a label for messages."""
        entries = {f"guard.stronger, entry {n}": change for n, change in enumerate(self.guard.stronger, 1)}
        changes = self.training.changes
        return entries | {f"training.changes, epoch {change.epoch}": change.settings for change in changes}

    def _check_losses(self) -> None:
        """Raise if the loss of an attack does not match the task, such as `ce` in a regression."""
        regression = self.objective.regression
        attacks = {"evaluation.validation": self.evaluation.validation}
        if self.evaluation.attack is not None:
            attacks["evaluation.attack"] = self.evaluation.attack
        if self.objective.adversarial and self.adversary.has_loss:
            attacks["adversary"] = self.adversary
        for path, attack in attacks.items():
            if regression is not None and (attack.loss in REGRESSION_LOSSES) != regression:
                kind, right = ("regression", "mae") if regression else ("classification", "ce")
                raise ValueError(f"{path}.loss = {attack.loss} does not suit a {kind}; set it to {right}")

    def written(self) -> dict[str, Any]:
        """Return every hyperparameter by its path, including later changes.

        A later change has a key such as "training.changes, epoch 5: PATH".
        """
        written = {path: value for path, value, _ in self.leaves()}
        for entry, change in self.settings_to_come().items():
            written |= {f"{entry}: {path}": value for path, value in flattened(change)}
        return written

    def until(self, epoch: int) -> Recipe:
        """Return the recipe without the changes that take effect at `epoch` or later."""
        changes = [change for change in self.training.changes if change.epoch < epoch]
        return self.model_copy(update={"training": self.training.model_copy(update={"changes": changes})})

    def next_change(self, epoch: int) -> int:
        """Return the next epoch after `epoch` with other settings in force, or else the last epoch."""
        epochs = [change.epoch for change in self.training.changes] + [self.model.unfreeze_epoch or 0]
        return min([e for e in epochs if e > epoch], default=self.training.epochs)

    def in_force(self, epoch: int, recoveries: int) -> Recipe:
        """Return the recipe in force after `epoch` epochs and `recoveries` recoveries of the guard.

        It has the changes of training.changes up to `epoch`, then the first `recoveries` entries of guard.stronger.
        From model.unfreeze_epoch on, it has no model.freeze.
        """
        due = [change.settings for change in self.until(epoch + 1).training.changes]
        unfreezes = self.model.unfreeze_epoch is not None and self.model.unfreeze_epoch <= epoch
        if not due and not recoveries and not unfreezes:
            return self
        values = self.values()
        if unfreezes:
            values["model"]["freeze"] = values["model"]["unfreeze_epoch"] = None
        for change in [*due, *self.guard.stronger[:recoveries]]:
            override(values, change)
        values["guard"]["stronger"] = values["training"]["changes"] = []
        return Recipe.model_validate(values, context={"in_force": True})

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal over all settings that affect the result.

        Names, placement and worker counts are left out.
        """
        return digest_of(self.model_dump(mode="json", exclude={"name": True, "description": True}))

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, with a digest in its last line.

        `load_recipe` reads it back to an equal recipe; `load_stored_recipe` also checks the digest.
        """
        text = yaml.safe_dump(self.values(), sort_keys=False)
        return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()[:32]}\n"

    def values(self) -> dict[str, Any]:
        """Return plain values that recreate the recipe; null only if it is not the default."""
        return nested_values(self)

    def leaves(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (path, value, description) of every hyperparameter, in the recipe's order."""
        yield from leaves(self, "")

    def warnings(self, eight_bit: bool) -> list[str]:
        """Return warnings about values that are allowed but probably not intended."""
        remarks = []
        second = [name for name, term in self.objective.used.items() if term.gradient]
        if self.training.precision == "bf16" and second:
            remarks.append(
                f"{', '.join(second)} compare small differences, which bf16 rounds (llr_gap changed by half in a "
                "test); use training.precision: fp32"
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
        UserError: the file is missing or not YAML, or a key, type or value is not allowed.
    """
    values = read_yaml(Path(source), "recipe")
    if not isinstance(values, dict):
        raise UserError(f"'{source}' must be a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    return _with_overrides(values, overrides, source, allow_code)


def _with_overrides(
    values: dict[str, Any], overrides: list[str] | None, source: str | Path, allow_code: bool
) -> Recipe:
    set_overrides(values, overrides or [])
    return parse_recipe(values, str(source), allow_code=allow_code)


def load_stored_recipe(
    source: Path, overrides: list[str] | None = None, *, allow_code: bool = False
) -> Recipe:
    """Read a recipe that this project wrote; old names of renamed keys are accepted.

    Raises:
        UserError: the file is damaged, or was changed after it was written.
    """
    values = read_yaml(source, "recipe")
    text, seal, digest = source.read_text().rpartition(_SEAL)
    if seal and digest.strip() != hashlib.sha256(text.encode()).hexdigest()[:32]:
        raise UserError(
            f"'{source}' was changed after it was written, or is damaged; to train another recipe, start a new run"
        )
    if not isinstance(values, dict):
        raise UserError(f"'{source}' is damaged: it is not a YAML mapping")
    return _with_overrides(with_present_names(values, Recipe), overrides, source, allow_code)


def parse_recipe(values: dict[str, Any], where: str, *, allow_code: bool = False) -> Recipe:
    """Validate a mapping and return the recipe, without importing code that it names.

    `where` names its origin in errors.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_all(error.errors(), where, Recipe)) from error
    foreign = {
        path: name
        for path, name in recipe.written().items()
        if path.endswith(_CODE_PATHS)
        and (runs_code(str(name)) or ":" in str(name) and not path.endswith("model.name"))
    }
    for path, name in foreign.items():
        if not allow_code:
            raise UserError(
                f"{where}: {path} '{name}' runs code that is not part of advtrain; add --allow-code if you trust it"
            )
    return recipe
