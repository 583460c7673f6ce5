"""Optimizers of torch.optim by name, gradient clipping, optimizer state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from advtrain.errors import UserError
from advtrain.models.blocks import NORMS
from advtrain.models.small import in_channel_order
from advtrain.recipe.optimizer import OPTIMIZER_OPTIONS, OptimizerConfig

#: Classes of the optimizers; beta1 and beta2 become `betas`.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, blocks: Mapping[str, Sequence[str]] | None = None
) -> torch.optim.Optimizer:
    """Build the torch optimizer with every hyperparameter from the configuration.

    Args:
        config: configuration of the optimizer.
        model: module whose parameters are trained, except those that require no gradient.
        blocks: the parameters of each block, from `block_parameters`; needed if blocks have their own learning rates.

    Returns:
        The optimizer. Each group has its peak learning rate, `initial_lr`.
    """
    options = {name: getattr(config, name) for name in OPTIMIZER_OPTIONS[config.name]}
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    if config.name != "rmsprop":  # one kernel for the whole update; torch has none for RMSprop
        options["fused"] = True
    groups = _parameter_groups(config, model)
    if config.per_block:
        groups = _split_by_block(config, groups, dict(model.named_parameters()), blocks or {})
    for group in groups:
        group["initial_lr"] = group.setdefault("lr", config.lr)
    return OPTIMIZERS[config.name](groups, lr=config.lr, **options)


def _parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters in groups.

    With `decay_all: false` biases and weights of norms are a group without weight decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.decay_all:
        return [{"params": trained}]
    plain = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name.endswith("bias")
    }
    return [
        {"params": [p for p in trained if p not in plain]},
        {"params": [p for p in trained if p in plain], "weight_decay": 0.0},
    ]


def _split_by_block(
    config: OptimizerConfig,
    groups: list[dict[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    blocks: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Split each group into one group per block, with the learning rate of the block; leave out empty groups."""
    found = []
    for number, names in enumerate(blocks.values(), 1):
        owned = {parameters[name] for name in names}
        for group in groups:
            if chosen := [p for p in group["params"] if p in owned]:
                found.append({**group, "params": chosen, "lr": config.block_lr(number, len(blocks))})
    return found


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
