"""Wrappers of an architecture for normalization, precision, memory layout and embeddings.

An attack changes a tensor z. For images and tables z is the input. For an EmbeddingModel z is embed(x), for example the
word embeddings of a text, and the rest of the network maps z to logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.recipe.data import TextShape
from advtrain.threat import ThreatModel


class EmbeddingModel(nn.Module, ABC):
    """Base class of networks whose embedding z = embed(x) is perturbed, not the input x.

    Attacks drop samples and form new batches, so z must hold everything that the logits of a sample depend on. A mask
    is therefore part of z, and `threat_at` excludes it from the free positions.

    If a torch.nn.Embedding gives z, let it be the attribute `table`. Radii may then be relative to its rows.
    """

    embeds: ClassVar[bool] = True

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Map inputs (N, ...) to the perturbed tensor z, (N, ...) float.

        Each row depends only on its own input, in training and evaluation mode alike: no dropout, no batch norm.
        """

    @abstractmethod
    def classify(self, z: Tensor) -> Tensor:
        """Map z (N, ...) to logits (N, K)."""

    @abstractmethod
    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return `threat` (norm, eps, group) with the bounds and the free positions of z."""

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map inputs, or their embeddings if `embedded`, to logits (N, K)."""
        return self.classify(x if embedded else self.embed(x))


class _Embedded(nn.Module):
    """Map from z to logits, for an EmbeddingModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(z, embedded=True)
        return logits


def example_inputs(shape: tuple[int, ...], rows: int) -> Tensor:
    """Return inputs (rows, *shape) for a trial: zeros, or texts of the token 1."""
    if isinstance(shape, TextShape):
        return torch.ones(rows, *shape, dtype=torch.int64)
    return torch.zeros(rows, *shape)


def embeds(model: nn.Module) -> bool:
    """Return True if attacks on the model perturb embed(x), not x."""
    return getattr(model, "embeds", False)


def embedding_table(network: nn.Module) -> Tensor | None:
    """Return the rows of an EmbeddingModel's `table` without padding, (V, D) float, detached.

    None if it has no `table`.
    """
    table = getattr(network, "table", None)
    if not embeds(network) or not isinstance(table, nn.Embedding):
        return None
    rows = torch.arange(table.num_embeddings, device=table.weight.device)
    return table.weight.detach()[rows != (-1 if table.padding_idx is None else table.padding_idx)]


def from_perturbed(model: nn.Module) -> nn.Module:
    """Return the model as a function z (N, ...) -> logits (N, K) that shares its weights."""
    return _Embedded(model) if embeds(model) else model


def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Return the tensor that attacks perturb for inputs x (N, ...): embed(x), or x itself.

    Raises:
        UserError: embed(x) has a different number of rows, or no floating-point type.
    """
    if not embeds(model):
        return x
    z: Tensor = model.embed(x)  # type: ignore[operator]
    if len(z) != len(x) or not z.is_floating_point():
        raise UserError(f"embed(x) must be floating point with {len(x)} rows, not {z.dtype} {tuple(z.shape)}")
    return z


def adversarial_point(model: nn.Module, found: Tensor) -> Tensor:
    """Return z of what an attack has found: z itself, or token ids of edited texts."""
    return found if found.is_floating_point() else embed(model, found)


def threat_at(model: nn.Module, z: Tensor, threat: ThreatModel) -> ThreatModel:
    """Return the threat model on the perturbed tensor z."""
    if not embeds(model):
        return threat
    found: ThreatModel = model.threat_at(z, threat)  # type: ignore[operator]
    return found


@torch.no_grad()
def attack_view(model: nn.Module, x: Tensor, threat: ThreatModel) -> tuple[nn.Module, Tensor, ThreatModel]:
    """Return the view of an attack: z (N, ...) -> logits, z of inputs x, threat model on z."""
    z = embed(model, x)
    return from_perturbed(model), z, threat_at(model, z, threat)


def pick_logits(outputs: object) -> object:
    """Return the logits in a model's outputs, or the outputs if they hold none.

    They are `.logits` of an object, "logits" of a mapping, or the first element of a tuple or list.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return outputs.logits  # type: ignore[attr-defined]
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs


class Normalized(nn.Module):
    """`network((x - mean) / std)` per channel; without mean and std the input is unchanged.

    From other outputs than a tensor it takes the logits, see `pick_logits`. For a regression with target scale (m, s)
    the output is m + s network(...).
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
        """True if embed(x) is perturbed."""
        return embeds(self.network)

    def embed(self, x: Tensor) -> Tensor:
        """Return the perturbed tensor, (N, ...)."""
        return embed(self.network, self._normalize(x))

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return the threat model on the perturbed tensor z."""
        return threat_at(self.network, z, threat)

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1] to logits (N, num_classes), or predictions (N, 1).

        With `embedded`, x is the output of `embed`.
        """
        found = self.network(x, embedded=True) if embedded else self.network(self._normalize(x))
        out: Tensor = pick_logits(found)  # type: ignore[assignment]
        return out if self.target_scale is None else self.target_scale[0] + self.target_scale[1] * out

    def _normalize(self, x: Tensor) -> Tensor:
        return x if self.identity else (x - self.mean) / self.std


class Network(nn.Module):
    """Model with a precision and a memory layout; logits are float32."""

    def __init__(self, model: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.channels_last = channels_last

    @property
    def embeds(self) -> bool:
        """True if embed(x) is perturbed."""
        return embeds(self.model)

    def embed(self, x: Tensor) -> Tensor:
        """Return the perturbed tensor, (N, ...), in full precision."""
        return embed(self.model, x)

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return the threat model on the perturbed tensor z."""
        return threat_at(self.model, z, threat)

    def forward(self, x: Tensor, *, embedded: bool = False) -> Tensor:
        """Map (N, C, H, W) or (N, F) in [0, 1] to logits (N, K) float32.

        With `embedded`, x is the output of `embed`.
        """
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
