"""The threat model: which perturbed inputs an attacker may choose. The norms live here and nowhere else.

An input `x` has shape (N, ...) with any trailing shape; a sample is everything behind the first
dimension. The allowed set of a sample is B(x) = {z : ||z - x||_p <= eps, low <= z <= high}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advtrain.lookup import Config, Number, UserError, show_number

Norm = Literal["linf", "l2"]


class ThreatConfig(Config):
    """The radius and norm under which a model is judged."""

    norm: Norm = "linf"
    """linf or l2"""
    eps: Number
    """radius in the input's units (pixels in [0, 1]); write 8/255, not 0.031"""


@dataclass(frozen=True)
class ThreatModel:
    """The set B(x): a ball of radius `eps` >= 0 in `norm`, cut by the box [low, high]."""

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UserError(f"unknown norm '{self.norm}'; known: linf, l2")
        if not self.eps >= 0:
            raise UserError(f"eps must be at least 0, not {self.eps}")

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """Read `linf:8/255` or `l2:0.5`."""
        norm, _, eps = text.partition(":")
        try:
            config = ThreatConfig.model_validate({"norm": norm, "eps": eps})
        except ValueError as error:
            raise UserError(f"'{text}' is no threat model; write for example linf:8/255 or l2:0.5") from error
        return cls(config.norm, config.eps)

    def scaled(self, factor: float) -> ThreatModel:
        """Return the same threat model with `factor` times the radius."""
        return ThreatModel(self.norm, self.eps * factor, self.low, self.high)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the point of B(x) nearest to `z` in the Euclidean distance.

        Args:
            z: (N, ...) float, any values.
            x: (N, ...) float in [low, high], the centres.
        """
        return self.projection(x)(z)

    def projection(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `z -> project(z, x)`, with what depends on `x` alone computed once."""
        if self.norm == "l2":
            return lambda z: self._project_l2(z, x)
        # The intersection of two boxes is a box: clamp is its exact projection.
        lower, upper = (x - self.eps).clamp_(min=self.low), (x + self.eps).clamp_(max=self.high)
        return lambda z: torch.clamp(z, lower, upper)

    def _project_l2(self, z: Tensor, x: Tensor) -> Tensor:
        """Clip after scaling by the right factor; clip-then-scale or scale-then-clip is not the nearest point.

        The KKT conditions give y(s) = clip(x + s (z - x)) for one s in (0, 1] per sample, the largest with
        ||y(s) - x|| <= eps. With r the room to the box's wall on the side that d = z - x points to,
        ||y(s) - x||^2 = sum min(s |d|, r)^2. Starting from no clipped coordinate, each round fixes those at
        the wall and solves for s on the rest; s only grows, so every round is inside the ball and the
        rounds end, exactly, as soon as no new coordinate hits its wall.
        """
        d = z - x
        length = d.flatten(1).abs()
        room = torch.where(d > 0, self.high - x, x - self.low).flatten(1)
        # Scaled to a longest coordinate of 1: squares of tiny differences must not underflow.
        unit = length.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        length, room, eps = length / unit, room / unit, self.eps / unit
        s = (eps / length.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
        while True:
            walled = s * length >= room
            rest = torch.where(walled, 0, length).square().sum(1, keepdim=True)
            left = (eps.square() - torch.where(walled, room, 0).square().sum(1, keepdim=True)).clamp_min(0)
            grown = torch.where(rest > 0, (left / rest.clamp_min(torch.finfo(x.dtype).tiny)).sqrt(), 1.0)
            grown = torch.maximum(s, grown.clamp_max(1.0))
            if torch.equal(grown * length >= room, walled):
                break
            s = grown
        factor = grown.view(-1, *[1] * (x.dim() - 1))
        return (x + factor * d).clamp_(self.low, self.high)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit norm that raises a linear function with this gradient most."""
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        # Divided by the largest entry first, so that the norm of a tiny gradient does not underflow to 0.
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1.0)
        return unit.view_as(gradient)

    def random_start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a point drawn uniformly from the ball around each sample, then projected onto the box.

        l2: a Gaussian direction, its length eps u^(1/d) with u uniform, is uniform in the ball (Muller 1959).
        """
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return noise.mul_(2 * self.eps).sub_(self.eps).add_(x).clamp_(self.low, self.high)
        direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype).flatten(1)
        radius = torch.rand(len(x), 1, generator=generator, device=x.device, dtype=x.dtype)
        radius = self.eps * radius.pow(1 / direction.shape[1])
        delta = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius
        return self.project(x + delta.view_as(x), x)

    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ||z - x||_p per sample, (N,)."""
        flat = (z - x).flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)

    def __str__(self) -> str:
        return f"{self.norm}:{show_number(self.eps)}"
