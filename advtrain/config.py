"""The recipe: one YAML file that fully defines a training run. It nests the parts' configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from advtrain.attacks import AttackConfig, BatchNormMode
from advtrain.data import DataConfig
from advtrain.lookup import Config, Number, UserError, nearest
from advtrain.models import ModelConfig
from advtrain.objective import ObjectiveConfig
from advtrain.optim import OptimizerConfig
from advtrain.threat import Norm, ThreatConfig, ThreatModel


class AdversaryConfig(AttackConfig):
    """The attack trained against. Its radius is a hyperparameter; the judge's is evaluation.threat."""

    norm: Norm = "linf"
    """linf or l2"""
    eps: Number = Field(ge=0)
    """radius of the training attack in input units"""
    fraction: Number = Field(default=1.0, ge=0, le=1)
    """share of each batch that is attacked: 0 is standard training"""
    eps_warmup_epochs: Number = Field(default=0.0, ge=0)
    """epochs over which eps (and step_size with it) rises linearly from 0; 0: constant"""
    batch_norm: BatchNormMode = "eval"
    """mode of batch norm while attacking: eval (running statistics) or train (the attacked batch's own)"""

    @property
    def threat(self) -> ThreatModel:
        """The training threat model at its full radius."""
        return ThreatModel(self.norm, self.eps)


class TrainingConfig(Config):
    """The loop, and how it is spread over processes."""

    epochs: int = Field(ge=1)
    """passes over the training split"""
    batch_size: int = Field(ge=1)
    """rows of a global batch, over all workers together"""
    num_workers: int | list[int] = 0
    """0: in this process; N: that many Ray Train workers; [min, max]: elastic"""
    cpus_per_worker: int = Field(default=1, ge=1)
    """cores reserved for, and threads used by, each Ray worker"""
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """fp32, or bf16 autocast (losses and perturbations stay in fp32)"""
    compile: bool = False
    """run the network through torch.compile"""
    channels_last: bool = True
    """memory layout NHWC, faster for convolutions on GPUs and with bf16"""
    max_failures: int = Field(default=3, ge=0)
    """how often a failed worker group is restarted from the last checkpoint"""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """steps between checkpoints within an epoch; null: at the end of each epoch only"""
    keep_checkpoints: int = Field(default=2, ge=1)
    """newest checkpoints kept, beside the best one"""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        workers = self.num_workers
        if isinstance(workers, list):
            if len(workers) != 2 or not 1 <= workers[0] <= workers[1]:
                raise ValueError(f"num_workers must be N or [min, max] with 1 <= min <= max, not {workers}")
        elif workers < 0:
            raise ValueError(f"num_workers must be at least 0, not {workers}")
        if self.batch_size < self.max_workers:
            raise ValueError(f"batch_size {self.batch_size} is smaller than the number of workers {workers}")
        return self

    @property
    def max_workers(self) -> int:
        """The largest number of workers."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


class EvaluationConfig(Config):
    """How models are judged: the same threat model for every run that is to be compared."""

    threat: ThreatConfig
    """norm and radius of the judge"""
    attack: AttackConfig = AttackConfig.model_validate({"num_steps": 50, "num_restarts": 5})
    """attack on the test split, once, on the finished model"""
    validation: AttackConfig = AttackConfig.model_validate({"num_steps": 10})
    """attack on the validation split, which selects the checkpoint"""
    validation_samples: int | None = Field(default=None, ge=1)
    """validation samples attacked each time (a fixed stratified draw); null: all"""
    validation_every: int = Field(default=1, ge=1)
    """epochs between validations; the last epoch is always validated"""
    batch_size: int = Field(default=500, ge=1)
    """rows of an evaluation batch, over all workers together"""
    seed: int = Field(default=0, ge=0)
    """seed of random starts"""

    @property
    def threat_model(self) -> ThreatModel:
        """The evaluation threat model."""
        return ThreatModel(self.threat.norm, self.threat.eps)


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
        if self.data.augment.resized_crop is not None and not self.data.stream:
            raise ValueError("data.augment.resized_crop needs data.stream: true")
        return self

    def digest(self) -> str:
        """Return 64 hexadecimal digits over all that shapes the result: not names, places or worker counts."""
        values = self.model_dump(mode="json", exclude={"name": True, "description": True})
        for key in ("num_workers", "cpus_per_worker", "max_failures", "checkpoint_steps", "keep_checkpoints"):
            del values["training"][key]
        del values["data"]["download"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    def leaves(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (path, value, description) of every hyperparameter, in the recipe's order."""
        yield from _leaves(self, "")

    def warnings(self, eight_bit: bool) -> list[str]:
        """Return remarks on values that are allowed but probably not meant."""
        remarks = []
        for path, value in (
            ("adversary.eps", self.adversary.eps),
            ("evaluation.threat.eps", self.evaluation.threat.eps),
        ):
            levels = round(value * 255)
            rounded = 0 < levels <= 25 and value != levels / 255 and abs(value * 255 / levels - 1) < 0.015
            if eight_bit and rounded:
                remarks.append(
                    f"{path} = {value:g} is not {levels}/255 = {levels / 255:.6f}, which 8-bit data suggests; "
                    f"write {levels}/255 if that is meant"
                )
        return remarks


def _leaves(config: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def load_recipe(
    source: str | Path, overrides: list[str] | None = None, *, allow_code: bool = False
) -> Recipe:
    """Read a recipe from a YAML file and apply `path=value` overrides.

    Raises:
        UserError: no such file, no YAML, or a key, type or value that is not allowed, with its path.
    """
    path = Path(source)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe '{source}': {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"'{source}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{source}' must be a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _override(values, override)
    return parse_recipe(values, str(source), allow_code=allow_code)


def parse_recipe(values: dict[str, Any], where: str, *, allow_code: bool = False) -> Recipe:
    """Check a mapping and return the recipe; `where` names its origin in errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, where) for e in error.errors())) from error
    model = recipe.model.name
    if ":" in model and not model.startswith("torchvision:") and not allow_code:
        raise UserError(
            f"{where}: model.name '{model}' runs code that is not part of advtrain; "
            "add --allow-code if you trust it"
        )
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set takes path=value, for example --set optimizer.lr=0.1, not '{override}'")
    *parents, leaf = path.split(".")
    node = values
    for key in parents:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: '{key}' is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: '{text}' is no YAML value") from error


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
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
