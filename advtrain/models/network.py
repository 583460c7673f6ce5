"""What surrounds an architecture: normalization inside the model, precision and memory layout around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """`network((x - mean) / std)`, per channel; without mean and std the input passes as it is.

    With a target scale (m, s), of a regression, the output is m + s network(...).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: list[float] | None,
        std: list[float] | None,
        target_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.target_scale = network, target_scale
        self.identity = mean is None and std is None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1] to logits (N, num_classes), or predictions (N, 1)."""
        if not self.identity:
            x = (x - self.mean) / self.std
        out: Tensor = self.network(x)
        return out if self.target_scale is None else self.target_scale[0] + self.target_scale[1] * out


class Network(nn.Module):
    """A model in its precision and memory layout; logits are float32."""

    def __init__(self, model: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1] to logits (N, K) float32."""
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            logits: Tensor = self.model(x)
            return logits
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.model(x)
        return logits.float()
