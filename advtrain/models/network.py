"""What surrounds an architecture: normalization inside the model, precision and memory layout around it.

An attack changes a tensor z. Of images and tables z is the input. Of an EmbeddingModel it is embed(x), for example the
word embeddings of a text, and what follows maps z to logits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.threat import ThreatModel


class EmbeddingModel(nn.Module):
    """Base class of networks of which not the input x is perturbed, but z = embed(x).

    Attacks drop samples and form new batches, so z holds everything that the logits of a sample depend on: a mask, too,
    as part of z that `threat_at` does not free.
    """

    embeds: ClassVar[bool] = True

    def embed(self, x: Tensor) -> Tensor:
        """Map inputs (N, ...) to what is perturbed, (N, ...) float.

        Each row depends on its own input alone, the same in training and evaluation mode: no dropout, no batch norm.
        """
        raise NotImplementedError

    def classify(self, z: Tensor) -> Tensor:
        """Map z (N, ...) to logits (N, K)."""
        raise NotImplementedError

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return `threat` (norm, eps, group) with the bounds of z, and with what is free in it."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map inputs, or with `embedded` what they were embedded to, to logits (N, K)."""
        return self.classify(x if embedded else self.embed(x))


class _Embedded(nn.Module):
    """z -> logits, of a model that embeds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(z, embedded=True)
        return logits


def embeds(model: nn.Module) -> bool:
    """Whether attacks on the model perturb embed(x), not x."""
    return getattr(model, "embeds", False)


def from_perturbed(model: nn.Module) -> nn.Module:
    """Return the model as a function of what is perturbed: z (N, ...) -> logits (N, K). The weights are shared."""
    return _Embedded(model) if embeds(model) else model


def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Return what an attack on the model perturbs at inputs x (N, ...): embed(x), or x itself.

    Raises:
        UserError: embed(x) has other rows, or no floating-point type.
    """
    if not embeds(model):
        return x
    z: Tensor = model.embed(x)  # type: ignore[operator]
    if len(z) != len(x) or not z.is_floating_point():
        raise UserError(f"embed(x) must be floating point with {len(x)} rows, not {z.dtype} {tuple(z.shape)}")
    return z


def threat_at(model: nn.Module, z: Tensor, threat: ThreatModel) -> ThreatModel:
    """Return the threat model on what is perturbed."""
    if not embeds(model):
        return threat
    found: ThreatModel = model.threat_at(z, threat)  # type: ignore[operator]
    return found


@torch.no_grad()
def attack_view(model: nn.Module, x: Tensor, threat: ThreatModel) -> tuple[nn.Module, Tensor, ThreatModel]:
    """Return what an attack sees: z (N, ...) -> logits, the z of inputs x, and the threat model on z."""
    z = embed(model, x)
    return from_perturbed(model), z, threat_at(model, z, threat)


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

    @property
    def embeds(self) -> bool:
        """Whether embed(x) is perturbed."""
        return embeds(self.network)

    def embed(self, x: Tensor) -> Tensor:
        """Return what is perturbed, (N, ...)."""
        return embed(self.network, self._normalize(x))

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return the threat model on what is perturbed."""
        return threat_at(self.network, z, threat)

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1] to logits (N, num_classes), or predictions (N, 1).

        With `embedded` x is what `embed` gave.
        """
        out: Tensor = self.network(x, embedded=True) if embedded else self.network(self._normalize(x))
        return out if self.target_scale is None else self.target_scale[0] + self.target_scale[1] * out

    def _normalize(self, x: Tensor) -> Tensor:
        return x if self.identity else (x - self.mean) / self.std


class Network(nn.Module):
    """A model in its precision and memory layout; logits are float32."""

    def __init__(self, model: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.channels_last = channels_last

    @property
    def embeds(self) -> bool:
        """Whether embed(x) is perturbed."""
        return embeds(self.model)

    def embed(self, x: Tensor) -> Tensor:
        """Return what is perturbed, (N, ...), in full precision."""
        return embed(self.model, x)

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return the threat model on what is perturbed."""
        return threat_at(self.model, z, threat)

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1], or with `embedded` what `embed` gave, to logits (N, K) float32."""
        if self.embeds and not embedded:
            x, embedded = self.embed(x), True
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        how = {"embedded": True} if embedded else {}
        if not self.bf16:
            logits: Tensor = self.model(x, **how)
            return logits
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.model(x, **how)
        return logits.float()
