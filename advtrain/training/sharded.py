"""FSDP: weights, gradients and optimizer state cut over the ranks, for models that do not fit on one device.

torch's FSDP2 (Zhao et al. 2023, PyTorch FSDP) gathers a block's weights before each pass, also in the attack. DDP
communicates once a step. Checkpoints hold whole tensors, so a run can resume with another number of workers, or without
sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from advtrain.models.network import embeds

#: Parameters that a module must have to be gathered by itself.
BLOCK_SIZE = 100_000


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Cut a model over all ranks, in place: its larger blocks each by itself, the rest together."""
    mesh = init_device_mesh(device.type, (world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if embeds(model):
        register_fsdp_forward_method(model, "embed")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the smallest modules with BLOCK_SIZE parameters, which are each called as a whole."""
    found = []
    for child in model.children():
        below = _blocks(child)
        size = sum(p.numel() for p in child.parameters())
        if below:
            found += below
        elif size >= BLOCK_SIZE and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.append(child)
    return found


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that are not cut; every rank must call it."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def load_whole(model: nn.Module, tensors: dict[str, Any]) -> None:
    """Load a whole state into a model that may be cut."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(tensors)
