"""FSDP: sharded training of models that do not fit on one device.

torch's FSDP2 (Zhao et al. 2023, PyTorch FSDP) shards weights, gradients and optimizer state over the ranks. It gathers
a block's weights before each pass, also in the attack; DDP communicates once per step. Checkpoints hold whole tensors,
so a run can resume with another number of workers, or without sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from advtrain.models.network import embeds

#: Minimum number of parameters of a module that is gathered separately.
BLOCK_SIZE = 100_000


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Shard a model over all ranks in place: each larger block separately, the rest together."""
    mesh = init_device_mesh(device.type, (world_size,))
    blocks = _blocks(model)
    for table in _tables(model):
        if any(block is not table and table in block.modules() for block in blocks):
            fully_shard(table, mesh=mesh)  # embed() calls it without its block
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if embeds(model):
        register_fsdp_forward_method(model, "embed")
        register_fsdp_forward_method(model, "threat_at")


def _tables(model: nn.Module) -> list[nn.Embedding]:
    """Return the tables of word embeddings."""
    found = (getattr(module, "table", None) for module in model.modules() if embeds(module))
    return [table for table in found if isinstance(table, nn.Embedding)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the smallest modules with at least BLOCK_SIZE parameters that are called whole."""
    found = []
    for child in model.children():
        below = _blocks(child)
        size = sum(p.numel() for p in child.parameters())
        if below:
            found += below
        elif size >= BLOCK_SIZE and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.append(child)
    return found


@contextmanager
def gradient_reduction(objective: nn.Module, model: nn.Module, enabled: bool) -> Iterator[None]:
    """Average the gradients of a pass over the ranks, or let them add up on each rank.

    Gradients that added up are averaged with those of the next pass for which it is enabled.

    Args:
        objective: module of the pass, in DistributedDataParallel or not.
        model: the model in it, sharded or not.
        enabled: False: let the gradients add up.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    wrapped = objective if isinstance(objective, DistributedDataParallel) else None
    with nullcontext() if enabled or wrapped is None else wrapped.no_sync():
        yield


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors unsharded. Collective call."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def load_whole(model: nn.Module, tensors: dict[str, Any]) -> None:
    """Load an unsharded state into a model that may be sharded."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(tensors)
