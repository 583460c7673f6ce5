"""Optimizer of a recipe, with its learning rate schedule."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from advtrain.schema import Config, Number

_SGD: dict[str, float | bool] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
_ADAM: dict[str, float | bool] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
}
#: Options of each optimizer, with torch's defaults.
OPTIMIZER_OPTIONS: dict[str, dict[str, float | bool]] = {
    "sgd": _SGD,
    "momentum": _SGD | {"momentum": 0.9},
    "nesterov": _SGD | {"momentum": 0.9, "nesterov": True},
    "adagrad": {"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10, "weight_decay": 0.0},
    "rmsprop": {"alpha": 0.99, "momentum": 0.0, "centered": False, "eps": 1e-8, "weight_decay": 0.0},
    "adam": _ADAM,
    "adamw": _ADAM | {"weight_decay": 0.01},
}


class ScheduleConfig(Config):
    """Learning rate schedule; optimizer.lr is multiplied by its value."""

    kind: Literal["constant", "multistep", "cosine", "one_cycle"] = "constant"
    """schedule: constant, multistep, cosine (to final_fraction), one_cycle (up to lr at `peak`, then down)"""
    warmup_epochs: Number = Field(default=0.0, ge=0)
    """epochs over which the rate rises linearly from 0 (not with one_cycle, which has its own warm-up)"""
    milestones: list[Number] = Field(default_factory=list)
    """multistep: epochs at which the rate is multiplied by gamma"""
    gamma: Number = Field(default=0.1, gt=0, le=1)
    """multistep: factor at each milestone"""
    peak: Number = Field(default=0.4, gt=0, lt=1)
    """one_cycle: fraction of the run at which the rate reaches lr"""
    final_fraction: Number = Field(default=0.0, ge=0, le=1)
    """cosine, one_cycle: final rate as a fraction of lr"""

    @model_validator(mode="after")
    def _applies(self) -> Self:
        used = {"multistep": {"milestones", "gamma"}, "cosine": {"final_fraction"}}.get(self.kind, set())
        if self.kind == "one_cycle":
            used = {"peak", "final_fraction"}
        for name in ("milestones", "gamma", "peak", "final_fraction"):
            if name in self.model_fields_set and name not in used and getattr(self, name) != _default(name):
                raise ValueError(f"schedule '{self.kind}' has no {name}")
        if self.kind == "multistep" and self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be increasing, not {self.milestones}")
        if self.kind == "multistep" and not self.milestones:
            raise ValueError("multistep needs milestones, for example [100, 105]")
        if self.kind == "one_cycle" and self.warmup_epochs:
            raise ValueError("one_cycle has its own warm-up; use peak instead of warmup_epochs")
        return self


def _default(name: str) -> Any:
    return ScheduleConfig.model_fields[name].get_default(call_default_factory=True)


class OptimizerConfig(Config):
    """Torch optimizer; unset options take torch's defaults, options it lacks must stay unset."""

    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"]
    """optimizer: sgd, momentum and nesterov (sgd with momentum 0.9), adagrad, rmsprop, adam or adamw"""
    lr: Number = Field(gt=0)
    """peak learning rate of the schedule; not scaled by the number of workers"""
    head_lr: Number | None = Field(default=None, gt=0)
    """peak learning rate of the network's last block, its head; null: lr"""
    layer_decay: Number | None = Field(default=None, gt=0, le=1)
    """factor by which the learning rate decreases from each block to the one before it, towards the input; block k of n
    has lr * layer_decay^(n - k), and head_lr replaces that of the last block; null: 1"""
    weight_decay: Number | None = Field(default=None, ge=0)
    """L2 penalty added to the gradient; adamw: decoupled decay"""
    momentum: Number | None = Field(default=None, ge=0)
    """sgd, momentum, nesterov, rmsprop: momentum factor"""
    dampening: Number | None = Field(default=None, ge=0)
    """sgd, momentum: fraction of the gradient that does not enter the momentum"""
    nesterov: bool | None = None
    """sgd, momentum, nesterov: use Nesterov momentum"""
    beta1: Number | None = Field(default=None, ge=0, lt=1)
    """adam, adamw: decay of the first moment"""
    beta2: Number | None = Field(default=None, ge=0, lt=1)
    """adam, adamw: decay of the second moment"""
    eps: Number | None = Field(default=None, gt=0)
    """adagrad, rmsprop, adam, adamw: added to the denominator"""
    amsgrad: bool | None = None
    """adam, adamw: use the running maximum of the second moment"""
    alpha: Number | None = Field(default=None, ge=0, lt=1)
    """rmsprop: decay of the squared gradient"""
    centered: bool | None = None
    """rmsprop: divide by the variance instead of the second moment"""
    lr_decay: Number | None = Field(default=None, ge=0)
    """adagrad: decay of the learning rate"""
    initial_accumulator_value: Number | None = Field(default=None, ge=0)
    """adagrad: initial sum of squared gradients"""
    clip_norm: Number | None = Field(default=None, gt=0)
    """maximum norm of the whole gradient, after reduction over the workers; null: no limit"""
    clip_value: Number | None = Field(default=None, gt=0)
    """maximum absolute gradient entry, applied before clip_norm; null: no limit"""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """decay of an exponential moving average of the weights, evaluated next to them; null: none"""
    swa_start_epoch: int | None = Field(default=None, ge=0)
    """epochs after which the weights at each epoch's end are averaged equally (SWA); the average is evaluated next to
    the weights, with recomputed batch norm statistics; null: none"""
    decay_all: bool = True
    """true: weight_decay also applies to biases and weights of normalization layers"""
    sam_rho: Number | None = Field(default=None, gt=0)
    """SAM: l2 radius of the weight perturbation at which each gradient is taken; null: off"""
    awp_gamma: Number | None = Field(default=None, gt=0)
    """AWP: radius of the weight perturbation of each tensor, relative to its norm; null: off"""
    awp_warmup_epochs: Number = Field(default=0.0, ge=0)
    """AWP: initial epochs without weight perturbation"""
    schedule: ScheduleConfig = ScheduleConfig()
    """learning rate schedule"""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        if isinstance(given, dict) and (defaults := OPTIMIZER_OPTIONS.get(str(given.get("name")))):
            set_here = {key: value for key, value in given.items() if value is not None}
            return defaults | set_here
        return given

    @model_validator(mode="after")
    def _applies(self) -> Self:
        every = set().union(*OPTIMIZER_OPTIONS.values())
        for field in sorted(every - set(OPTIMIZER_OPTIONS[self.name])):
            if getattr(self, field) is not None:
                takers = [name for name, defaults in OPTIMIZER_OPTIONS.items() if field in defaults]
                raise ValueError(f"'{self.name}' has no {field}; it belongs to {', '.join(takers)}")
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("nesterov needs momentum above 0 and dampening 0")
        for one, other in (("ema_decay", "swa_start_epoch"), ("sam_rho", "awp_gamma")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} exclude each other; leave one of them out")
        if self.awp_warmup_epochs and self.awp_gamma is None:
            raise ValueError("awp_warmup_epochs belongs to awp_gamma, which is not set")
        if not self.decay_all and not self.weight_decay:
            raise ValueError("decay_all: false does nothing without weight_decay")
        return self

    @property
    def per_block(self) -> bool:
        """True if blocks of the network have learning rates of their own."""
        return self.head_lr is not None or self.layer_decay is not None

    def block_lr(self, number: int, count: int) -> float:
        """Return the peak learning rate of block `number` (1: at the input) of `count` blocks."""
        if number == count and self.head_lr is not None:
            return self.head_lr
        return float(self.lr * (self.layer_decay or 1.0) ** (count - number))
