"""Optimizers of torch.optim by name, gradient clipping, optimizer state as named tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase

from advtrain.errors import UserError
from advtrain.models.small import in_channel_order
from advtrain.optim.schedules import ScheduleConfig
from advtrain.schema import Config, Number


@dataclass(frozen=True)
class _Family:
    """Torch optimizer with its options and their defaults; beta1 and beta2 become `betas`."""

    factory: Callable[..., torch.optim.Optimizer]
    defaults: dict[str, float | bool]


_SGD: dict[str, float | bool] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
_ADAM: dict[str, float | bool] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
}

OPTIMIZERS: dict[str, _Family] = {
    "sgd": _Family(torch.optim.SGD, _SGD),
    "momentum": _Family(torch.optim.SGD, _SGD | {"momentum": 0.9}),
    "nesterov": _Family(torch.optim.SGD, _SGD | {"momentum": 0.9, "nesterov": True}),
    "adagrad": _Family(
        torch.optim.Adagrad,
        {"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10, "weight_decay": 0.0},
    ),
    "rmsprop": _Family(
        torch.optim.RMSprop,
        {"alpha": 0.99, "momentum": 0.0, "centered": False, "eps": 1e-8, "weight_decay": 0.0},
    ),
    "adam": _Family(torch.optim.Adam, _ADAM),
    "adamw": _Family(torch.optim.AdamW, _ADAM | {"weight_decay": 0.01}),
}


class OptimizerConfig(Config):
    """Torch optimizer; unset options take torch's defaults, options it lacks must stay unset."""

    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"]
    """optimizer: sgd, momentum and nesterov (sgd with momentum 0.9), adagrad, rmsprop, adam or adamw"""
    lr: Number = Field(gt=0)
    """peak learning rate of the schedule; not scaled by the number of workers"""
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
        if isinstance(given, dict) and (family := OPTIMIZERS.get(str(given.get("name")))):
            set_here = {key: value for key, value in given.items() if value is not None}
            return family.defaults | set_here
        return given

    @model_validator(mode="after")
    def _applies(self) -> Self:
        every = set().union(*(family.defaults for family in OPTIMIZERS.values()))
        for field in sorted(every - set(OPTIMIZERS[self.name].defaults)):
            if getattr(self, field) is not None:
                takers = [name for name, family in OPTIMIZERS.items() if field in family.defaults]
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


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the torch optimizer with every hyperparameter from the configuration."""
    family = OPTIMIZERS[config.name]
    options = {name: getattr(config, name) for name in family.defaults}
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    if config.name != "rmsprop":  # one kernel for the whole update; torch has none for RMSprop
        options["fused"] = True
    return family.factory(_parameter_groups(config, model), lr=config.lr, **options)


def _parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters in groups.

    With `decay_all: false` biases and weights of norms are a group without weight decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.decay_all:
        return [{"params": trained}]
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    plain = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name.endswith("bias")
    }
    return [
        {"params": [p for p in trained if p not in plain]},
        {"params": [p for p in trained if p in plain], "weight_decay": 0.0},
    ]


def clip_gradients(config: OptimizerConfig, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Clip the gradients in place by value, then by norm.

    Returns:
        The gradient norm before clipping (0-dim), and whether anything was clipped (0-dim bool).
        The norm is NaN or infinite if any gradient entry is.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # gradients are sharded over the ranks
        whole = norm.full_tensor()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
        return whole, whole > (config.clip_norm or float("inf"))
    clipped = torch.zeros((), dtype=torch.bool, device=norm.device)
    if config.clip_value is not None:
        largest = torch.stack([g.abs().max() for g in gradients]).max()
        clipped = clipped | (largest > config.clip_value)
        torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
    if config.clip_norm is not None:
        now = torch.nn.utils.get_total_norm(gradients) if config.clip_value is not None else norm
        clipped = clipped | (now > config.clip_norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, now)
    return norm, clipped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `PARAMETER.KEY`; the recipe has the rest."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": v for i, entry in state.items() for key, v in entry.items() if v is not None}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors`, each in the memory layout of its parameter.

    The fused kernels read parameter and state in memory order. With one in NHWC and the other in NCHW order the update
    would be silently wrong.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if int(number) >= len(parameters):
            raise UserError(
                f"the checkpoint has optimizer state for parameter {number}, "
                f"but the model has {len(parameters)} parameters"
            )
        like = parameters[int(number)]
        if isinstance(like, DTensor) and tensor.shape == like.shape:
            tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        elif (tensor := in_channel_order(tensor, like)).shape == like.shape:
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        elif tensor.dim() > 0:
            raise UserError(
                f"the checkpoint's optimizer state does not fit the model: '{name}' has shape "
                f"{tuple(tensor.shape)}, but its parameter has shape {tuple(like.shape)}"
            )
        state.setdefault(int(number), {})[key] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint's optimizer state does not fit the recipe's optimizer: {error}"
        ) from error
