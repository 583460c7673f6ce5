"""Threat model: the set of perturbed inputs that an attacker may choose.

All norms are implemented here. The perturbed tensor `x` has shape (N, ...) with any trailing shape. It is the input, or
the embedding of the input in a network (`models/network.py`). The allowed set of a sample is
B(x) = {z : ||z - x||_p <= eps, low <= z <= high}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from advtrain.errors import UserError
from advtrain.projections import project_l1, project_l2
from advtrain.schema import MOST, Norm, parse_number, show_number

Group = Literal["sample", "token"]

#: l1: minimum fraction of the coordinates that one step moves.
L1_SHARE = 0.01


def alongside(values: Tensor, x: Tensor) -> Tensor:
    """Reshape per-sample values (N,) or (N, 1) to (N, 1, ...), to broadcast over `x` (N, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class ThreatModel:
    """Set B(x): a ball of radius `eps` >= 0 in `norm`, intersected with the box [low, high].

    Args:
        norm: linf, l2 or l1.
        eps: radius in the units of the perturbed tensor.
        low, high: bounds of the box; -inf and inf for no box.
        radius_scale: (N,) in [0, 1]; the radius of sample i is `eps * radius_scale[i]`. None: 1.
        group: dimensions of the norm. "sample": all dimensions after the first. "token", for x (N, L, ...): all
            dimensions after the second, so that every token has its own ball.
        free: bool (N, ...), broadcast to x; True where x may change. None: everywhere.
    """

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0
    radius_scale: Tensor | None = field(default=None, compare=False)
    group: Group = "sample"
    free: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UserError(f"unknown norm '{self.norm}'; known: linf, l2, l1")
        if not self.eps >= 0:
            raise UserError(f"eps must be at least 0, not {self.eps}")

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """Parse a text such as `linf:8/255` or `l2:0.5`."""
        norm, _, written = text.partition(":")
        eps = parse_number(written)
        if norm not in get_args(Norm) or not isinstance(eps, float) or not 0 <= eps <= MOST:
            raise UserError(f"'{text}' is not a threat model; write for example linf:8/255 or l2:0.5")
        return cls(norm, eps)  # type: ignore[arg-type]

    def scaled(self, factor: float) -> ThreatModel:
        """Return the same threat model with `factor` times the radius."""
        return replace(self, eps=self.eps * factor)

    def with_radius_scale(self, radius_scale: Tensor) -> ThreatModel:
        """Return the same threat model with the radius `radius_scale` (N,) times eps per sample."""
        return replace(self, radius_scale=radius_scale)

    def rows(self, index: Tensor | slice) -> ThreatModel:
        """Return the threat model of the samples `index`: (M,) int64, (N,) bool, or a slice."""
        if self.radius_scale is None and self.free is None:
            return self
        scale, free = (None if v is None else v[index] for v in (self.radius_scale, self.free))
        return replace(self, radius_scale=scale, free=free)

    def join(self, others: Sequence[ThreatModel]) -> ThreatModel:
        """Return the threat model of these samples followed by those of `others`.

        All have the same settings except `radius_scale` and `free`.
        """
        scales = [model.radius_scale for model in (self, *others) if model.radius_scale is not None]
        free = [model.free for model in (self, *others) if model.free is not None]
        if not scales and not free:
            return self
        return replace(
            self,
            radius_scale=torch.cat(scales) if scales else None,
            free=torch.cat(free) if free else None,
        )

    def by_token(self, x: Tensor) -> ThreatModel:
        """Return the threat model for x.flatten(0, 1): each token of x (N, L, ...) is a sample."""
        if x.dim() < 3:
            raise UserError(f"a norm over tokens needs x (N, L, ...), not {tuple(x.shape)}")
        scale, free = self.radius_scale, self.free
        return replace(
            self,
            group="sample",
            radius_scale=None if scale is None else scale.repeat_interleave(x.shape[1]),
            free=None if free is None else free.expand(*x.shape[:2], *free.shape[2:]).flatten(0, 1),
        )

    @property
    def covers_input(self) -> bool:
        """True if B(x) is one ball around the whole of x in a finite box, as for images."""
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        return finite and self.group == "sample" and self.free is None

    def where_free(self, values: Tensor, otherwise: Tensor | float) -> Tensor:
        """Return `values` (N, ...) where x may change, `otherwise` elsewhere."""
        return values if self.free is None else torch.where(self.free, values, otherwise)

    def _num_free(self, x: Tensor) -> int | Tensor:
        """Return the number of elements of a sample that may change, at least 1; int or (N, 1)."""
        if self.free is None:
            return x[0].numel()
        return self.free.expand_as(x).flatten(1).sum(1, keepdim=True).clamp_min(1)

    def per_sample(self, length: float, x: Tensor) -> float | Tensor:
        """Return `length`, times radius_scale if set, as (N, 1, ...) to broadcast over `x`."""
        if self.radius_scale is None:
            return length
        return alongside(length * self.radius_scale.to(x.dtype), x)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the point of B(x) nearest to `z` in the Euclidean distance.

        Args:
            z: (N, ...) float, any values.
            x: (N, ...) float in [low, high], the centers.
        """
        return self.projection(x)(z)

    def projection(self, x: Tensor) -> Projection:
        """Return the function `z -> project(z, x)`, with the parts that depend on `x` precomputed."""
        return Projection(self, self.bounds(x) if self.norm == "linf" else (x,))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower and the upper bound of each linf set B(x), (N, ...)."""
        radius = self.per_sample(self.eps, x)
        least, greatest = (x - radius).clamp_(min=self.low), (x + radius).clamp_(max=self.high)
        return self.where_free(least, x), self.where_free(greatest, x)

    def step(self, z: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """Return `z` moved by `alpha` (times radius_scale) in the steepest direction.

        l1: the steepest direction is a single coordinate, so an attack would need a step per coordinate, and would
        not move at all if that coordinate is at the box boundary. So the length is spent on coordinates in the order
        of |gradient|. Each moves at most to the box boundary, and by at most an equal part of the length for a
        fraction L1_SHARE of the coordinates (SLIDE, Tramer & Boneh 2019, arXiv 1904.13000; the box as in
        Croce & Hein 2021, arXiv 2103.01208).
        """
        if self.group == "token":
            tokens = self.by_token(z)
            return tokens.step(z.flatten(0, 1), gradient.flatten(0, 1), alpha).view_as(z)
        length = self.per_sample(alpha, z)
        if self.norm != "l1":
            direction = self.steepest(gradient)
            if isinstance(length, Tensor):
                return torch.addcmul(z, direction, length)
            return z.add(direction, alpha=length)
        flat, at = self.where_free(gradient, 0.0).flatten(1), z.flatten(1)
        total = self.per_sample(alpha, flat)
        room = torch.where(flat > 0, self.high - at, at - self.low).clamp_min(0)
        least_moved = L1_SHARE * self._num_free(z)
        least_moved = least_moved.ceil() if isinstance(least_moved, Tensor) else math.ceil(least_moved)
        most = torch.minimum(room, torch.as_tensor(total / least_moved, device=z.device))
        order = flat.abs().argsort(dim=1, descending=True)
        allowed = torch.where(flat == 0, 0, most).gather(1, order)
        spent = torch.minimum(allowed, (total - (allowed.cumsum(1) - allowed)).clamp_min(0))
        move = torch.zeros_like(flat).scatter_(1, order, spent) * flat.sign()
        return z + move.view_as(z)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the unit-norm direction of steepest ascent for this gradient."""
        if self.group == "token":
            return self.by_token(gradient).steepest(gradient.flatten(0, 1)).view_as(gradient)
        gradient = self.where_free(gradient, 0.0)
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        if self.norm == "l1":
            index = flat.abs().argmax(1, keepdim=True)
            return torch.zeros_like(flat).scatter_(1, index, flat.gather(1, index).sign()).view_as(gradient)
        # Division by the largest entry keeps the norm of a tiny gradient from underflowing to 0.
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1.0)
        return unit.view_as(gradient)

    def random_start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a random point per sample, uniform in the ball and then projected onto the box.

        l2: a Gaussian direction with length eps u^(1/d), u uniform, is uniform in the ball (Muller 1959).
        l1: d of d + 1 exponential variables divided by their sum, with random signs, are uniform in the ball.
        """
        if self.group == "token":
            return self.by_token(x).random_start(x.flatten(0, 1), generator).view_as(x)
        like: dict[str, Any] = {"generator": generator, "device": x.device, "dtype": x.dtype}
        if self.norm == "linf":
            least, width = x - self.per_sample(self.eps, x), self.per_sample(2 * self.eps, x)
            start = (least + torch.rand(x.shape, **like) * width).clamp_(self.low, self.high)
            return self.where_free(start, x)
        eps = self.per_sample(self.eps, x.flatten(1))
        if self.norm == "l1":
            signs = torch.rand(x.shape, **like).flatten(1) - 0.5
            parts = torch.empty(len(x), signs.shape[1] + 1, device=x.device, dtype=x.dtype)
            parts = parts.exponential_(generator=generator)
            moved = self.where_free(parts[:, 1:].reshape(x.shape), 0.0).flatten(1)
            total = parts if self.free is None else torch.cat([parts[:, :1], moved], 1)
            delta = eps * signs.sign() * moved / total.sum(1, keepdim=True)
            return self.project(x + delta.view_as(x), x)
        direction = self.where_free(torch.randn(x.shape, **like), 0.0).flatten(1)
        radius = eps * torch.rand(len(x), 1, **like).pow(1 / self._num_free(x))
        delta = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius
        return self.project(x + delta.view_as(x), x)

    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ||z - x||_p per sample, (N,)."""
        return self.length(z - x)

    def length(self, delta: Tensor) -> Tensor:
        """Return ||delta||_p per sample, (N,); with a norm per token the maximum over tokens."""
        if self.group == "token":
            return self.by_token(delta).length(delta.flatten(0, 1)).view(delta.shape[:2]).amax(1)
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.abs().sum(1) if self.norm == "l1" else flat.norm(dim=1)

    def __str__(self) -> str:
        return f"{self.norm}:{show_number(self.eps)}" + (" per token" if self.group == "token" else "")


@dataclass(frozen=True, eq=False)
class Projection:
    """Projection `z -> threat.project(z, x)` for repeated use with the same x (N, ...)."""

    threat: ThreatModel
    known: tuple[Tensor, ...]  # linf: lower and upper bound of each B(x); else x; (N, ...)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the point of B(x) nearest to `z` (N, ...) in the Euclidean distance."""
        if self.threat.norm == "linf":  # B(x) is a box, so clamp is the exact projection
            return torch.clamp(z, *self.known)
        (x,) = self.known
        if self.threat.group == "token":
            return self._by_token(x)(z.flatten(0, 1)).view_as(z)
        z, radius = self.threat.where_free(z, x), self.threat.per_sample(self.threat.eps, x.flatten(1))
        project = project_l2 if self.threat.norm == "l2" else project_l1
        return project(z, x, radius, self.threat.low, self.threat.high)

    def box_first(self, z: Tensor) -> Tensor:
        """Return a point of B(x) for `z` (N, ...): l2 clips to the box, then scales into the ball.

        Other norms return the nearest point. The l2 point is not the nearest one: coordinates that a step moves beyond
        the box boundary are scaled with the others. At the nearest point they end at the boundary.
        """
        if self.threat.norm != "l2":
            return self(z)
        (x,) = self.known
        if self.threat.group == "token":
            return self._by_token(x).box_first(z.flatten(0, 1)).view_as(z)
        delta = self.threat.where_free(z.clamp(self.threat.low, self.threat.high) - x, 0.0)
        length = self.threat.length(delta).clamp_min(torch.finfo(x.dtype).tiny)
        most = torch.as_tensor(self.threat.per_sample(self.threat.eps, x), dtype=x.dtype, device=x.device)
        share = (most / alongside(length, x)).clamp_max(1)
        return torch.addcmul(x, delta, share).clamp_(self.threat.low, self.threat.high)

    def _by_token(self, x: Tensor) -> Projection:
        return self.threat.by_token(x).projection(x.flatten(0, 1))

    def take(self, index: Tensor) -> Projection:
        """Return the projection of the samples `index`, (M,) int64 or (N,) bool."""
        return Projection(self.threat.rows(index), tuple(known[index] for known in self.known))

    def join(self, others: Sequence[Projection]) -> Projection:
        """Return the projection of these samples followed by those of `others`."""
        columns = zip(self.known, *(other.known for other in others), strict=True)
        threat = self.threat.join([other.threat for other in others])
        return Projection(threat, tuple(torch.cat(column) for column in columns))
