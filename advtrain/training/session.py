"""Session of a rank: rank, world size, device, and collective calls between ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advtrain.data import Place


@dataclass(frozen=True)
class Session:
    """Rank, world size and device of one training process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    node: str = "this machine"
    notice: Callable[[], str | None] | None = None
    """collective call that returns the preemption notice for any of our nodes, or None"""

    @property
    def place(self) -> Place:
        """Destination of this rank's batches."""
        return Place(self.rank, self.world_size, self.device)

    def sum(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return the sums of the values over all ranks, in float64. Collective call, same keys."""
        if not values:
            return {}
        total = torch.stack([value.detach().to(self.device, torch.float64) for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def agree(self, word: str | None) -> str | None:
        """Return rank 0's `word` on every rank. Collective call, and a barrier for the other ranks."""
        if self.world_size == 1:
            return word
        words = [word]
        dist.broadcast_object_list(words, src=0, device=self.device)
        return words[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order. Collective call."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows (n, ...) of all ranks, in rank order; n must be the same on every rank."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def own_rows(self, tensor: Tensor, batch_size: int) -> Tensor:
        """Return this rank's slice of rows gathered by `all_rows`, perhaps at another world size.

        The slice has ceil(batch_size / world_size) rows.
        """
        count = math.ceil(batch_size / self.world_size)
        rows = torch.arange(self.rank * count, (self.rank + 1) * count) % len(tensor)
        return tensor[rows].to(self.device)


@dataclass
class Stopwatch:
    """Context manager that sums up the time spent inside, without synchronizing the device."""

    device: torch.device
    total: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._events.append((events[0], events[1]))
            events[0].record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self.total += time.perf_counter() - self._started

    def read(self) -> float:
        """Return the seconds measured since the last call."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self.total += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self.total = self.total, 0.0
        return seconds


def average_buffers(model: nn.Module, session: Session) -> None:
    """Average batch norm's running statistics over all ranks, in place.

    All ranks then attack and evaluate the same network, and a resume from rank 0's checkpoint is exact. Batch norm in
    evaluation mode is frozen and left as it is.
    """
    if session.world_size == 1:
        return
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([b.reshape(-1) for b in buffers])
    dist.all_reduce(flat)
    flat /= session.world_size
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
