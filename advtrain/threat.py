"""The threat model: which perturbed inputs an attacker may choose. The norms live here and nowhere else.

An input `x` has shape (N, ...) with any trailing shape; a sample is everything behind the first
dimension. The allowed set of a sample is B(x) = {z : ||z - x||_p <= eps, low <= z <= high}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from advtrain.errors import UserError
from advtrain.schema import Config, Number, parse_number, show_number

Norm = Literal["linf", "l2", "l1"]

#: l1: share of the coordinates that one step moves at least.
L1_SHARE = 0.01


def alongside(values: Tensor, x: Tensor) -> Tensor:
    """Return a value for each sample, (N,) or (N, 1), as (N, 1, ...), to broadcast over `x` (N, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


class ThreatConfig(Config):
    """The radius and norm under which a model is judged."""

    norm: Norm = "linf"
    """linf, l2 or l1"""
    eps: Number = Field(ge=0)
    """radius in the input's units (pixels in [0, 1]); write 8/255, not 0.031"""


def rounded_radii(radii: Mapping[str, object]) -> list[str]:
    """Return remarks on radii, by what to call them, that look like rounded grey levels: 0.031 for 8/255."""
    remarks = []
    for name, value in radii.items():
        eps = parse_number(value)
        if not isinstance(eps, float):
            continue
        levels = round(eps * 255)
        if 0 < levels <= 25 and eps != levels / 255 and abs(eps * 255 / levels - 1) < 0.015:
            remarks.append(
                f"{name} = {eps:g} is not {levels}/255 = {levels / 255:.6f}, which 8-bit data suggests; "
                f"write {levels}/255 if that is meant"
            )
    return remarks


@dataclass(frozen=True)
class ThreatModel:
    """The set B(x): a ball of radius `eps` >= 0 in `norm`, cut by the box [low, high].

    `radius_scale` (N,) in [0, 1], where given, makes the radius of sample i `eps * radius_scale[i]`.
    """

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0
    radius_scale: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l1"):
            raise UserError(f"unknown norm '{self.norm}'; known: linf, l2, l1")
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
        return replace(self, eps=self.eps * factor)

    def with_radius_scale(self, radius_scale: Tensor) -> ThreatModel:
        """Return the same threat model with a radius for each sample: `radius_scale` (N,) of eps."""
        return replace(self, radius_scale=radius_scale)

    def rows(self, index: Tensor | slice) -> ThreatModel:
        """Return the threat model of these samples: `index` (M,) int64, (N,) bool, or a slice."""
        return self if self.radius_scale is None else replace(self, radius_scale=self.radius_scale[index])

    def join(self, others: Sequence[ThreatModel]) -> ThreatModel:
        """Return the threat model of these samples and the others': the same but for `radius_scale`."""
        radius_scale = [model.radius_scale for model in (self, *others) if model.radius_scale is not None]
        return replace(self, radius_scale=torch.cat(radius_scale)) if radius_scale else self

    def per_sample(self, length: float, x: Tensor) -> float | Tensor:
        """Return `length`, or with a radius_scale each sample's share of it, (N, 1, ...) to broadcast over `x`."""
        if self.radius_scale is None:
            return length
        return alongside(length * self.radius_scale.to(x.dtype), x)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the point of B(x) nearest to `z` in the Euclidean distance.

        Args:
            z: (N, ...) float, any values.
            x: (N, ...) float in [low, high], the centres.
        """
        return self.projection(x)(z)

    def projection(self, x: Tensor) -> Projection:
        """Return `z -> project(z, x)`, with what depends on `x` alone computed once."""
        return Projection(self, self.bounds(x) if self.norm == "linf" else (x,))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """linf: return the least and the greatest point of each B(x), (N, ...)."""
        radius = self.per_sample(self.eps, x)
        return (x - radius).clamp_(min=self.low), (x + radius).clamp_(max=self.high)

    def _project_l1(self, z: Tensor, x: Tensor) -> Tensor:
        """Shrink every coordinate's distance by one multiplier per sample, found exactly by sorting.

        The KKT conditions give |y_i - x_i| = min(max(|d_i| - m, 0), r_i) with d = z - x, r the room to the
        box's wall on d's side and m >= 0 the least with sum_i |y_i - x_i| <= eps. That sum is piecewise linear
        in m, with a bend at each |d_i| and each |d_i| - r_i: the bends are sorted, and m solved for between
        the two where the sum passes eps (Duchi et al. 2008, generalised to the box). In float64.
        """
        d = (z - x).flatten(1).double()
        length = d.abs()
        room = torch.where(d > 0, self.high - x.flatten(1), x.flatten(1) - self.low).double()
        bends = torch.cat([length, (length - room).clamp_min(0)], 1)
        signs = torch.cat([torch.ones_like(length), -torch.ones_like(length)], 1)
        bends, order = bends.sort(dim=1, descending=True)
        signs = signs.gather(1, order)
        total_slope, total = signs.cumsum(1), (signs * bends).cumsum(1)
        eps = torch.as_tensor(self.per_sample(self.eps, x.flatten(1)), dtype=torch.float64, device=x.device)
        at_bend = total - bends * total_slope  # the sum at m = bend; it never falls along the row
        passed = (at_bend < eps).sum(1, keepdim=True)
        last = (passed - 1).clamp_min(0)
        slope = total_slope.gather(
            1, last
        )  # a whole number; 0 where all that is inside its walls gives eps exactly
        m = torch.where(slope > 0, (total.gather(1, last) - eps) / slope.clamp_min(1), bends.gather(1, last))
        m = torch.where(passed == 0, bends[:, :1], m.clamp_min(0))  # eps 0: everything is taken away
        m = torch.where(total[:, -1:] <= eps, 0, m)
        kept = torch.minimum((length - m).clamp_min(0), room)
        return (x + (d.sign() * kept).to(x.dtype).view_as(x)).clamp_(self.low, self.high)

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
        length, room, eps = length / unit, room / unit, self.per_sample(self.eps, x.flatten(1)) / unit
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
        return (x + alongside(grown, x) * d).clamp_(self.low, self.high)

    def step(self, z: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """Return `z` moved by the length `alpha` (of a sample's share of it) in the steepest direction.

        l1: the steepest direction is a single coordinate, which would take as many steps as there are
        coordinates, and for ever where it is at the wall. So the length is spent on coordinates in the order of
        |gradient|, on each at most its room to the box's wall and an equal part of what L1_SHARE of them would
        get (SLIDE, Tramer & Boneh 2019, arXiv 1904.13000; the box as in Croce & Hein 2021, arXiv 2103.01208).
        """
        length = self.per_sample(alpha, z)
        if self.norm != "l1":
            direction = self.steepest(gradient)
            if isinstance(length, Tensor):
                return torch.addcmul(z, direction, length)
            return z.add(direction, alpha=length)
        flat, at = gradient.flatten(1), z.flatten(1)
        total = self.per_sample(alpha, flat)
        room = torch.where(flat > 0, self.high - at, at - self.low).clamp_min(0)
        most = torch.minimum(
            room, torch.as_tensor(total / math.ceil(L1_SHARE * flat.shape[1]), device=z.device)
        )
        order = flat.abs().argsort(dim=1, descending=True)
        allowed = torch.where(flat == 0, 0, most).gather(1, order)
        spent = torch.minimum(allowed, (total - (allowed.cumsum(1) - allowed)).clamp_min(0))
        move = torch.zeros_like(flat).scatter_(1, order, spent) * flat.sign()
        return z + move.view_as(z)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit norm that raises a linear function with this gradient most."""
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        if self.norm == "l1":
            index = flat.abs().argmax(1, keepdim=True)
            return torch.zeros_like(flat).scatter_(1, index, flat.gather(1, index).sign()).view_as(gradient)
        # Divided by the largest entry first, so that the norm of a tiny gradient does not underflow to 0.
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1.0)
        return unit.view_as(gradient)

    def random_start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a point drawn uniformly from the ball around each sample, then projected onto the box.

        l2: a Gaussian direction, its length eps u^(1/d) with u uniform, is uniform in the ball (Muller 1959).
        l1: d of d + 1 exponentials divided by their sum, with random signs, are uniform in the ball.
        """
        like: dict[str, Any] = {"generator": generator, "device": x.device, "dtype": x.dtype}
        if self.norm == "linf":
            least, width = x - self.per_sample(self.eps, x), self.per_sample(2 * self.eps, x)
            return (least + torch.rand(x.shape, **like) * width).clamp_(self.low, self.high)
        eps = self.per_sample(self.eps, x.flatten(1))
        if self.norm == "l1":
            signs = torch.rand(x.shape, **like).flatten(1) - 0.5
            parts = torch.empty(len(x), signs.shape[1] + 1, device=x.device, dtype=x.dtype)
            parts = parts.exponential_(generator=generator)
            delta = eps * signs.sign() * parts[:, 1:] / parts.sum(1, keepdim=True)
            return self.project(x + delta.view_as(x), x)
        direction = torch.randn(x.shape, **like).flatten(1)
        radius = eps * torch.rand(len(x), 1, **like).pow(1 / direction.shape[1])
        delta = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius
        return self.project(x + delta.view_as(x), x)

    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ||z - x||_p per sample, (N,)."""
        return self.length(z - x)

    def length(self, delta: Tensor) -> Tensor:
        """Return ||delta||_p per sample, (N,)."""
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.abs().sum(1) if self.norm == "l1" else flat.norm(dim=1)

    def __str__(self) -> str:
        return f"{self.norm}:{show_number(self.eps)}"


@dataclass(frozen=True, eq=False)
class Projection:
    """`z -> threat.project(z, x)` for the same x (N, ...) again and again."""

    threat: ThreatModel
    known: tuple[Tensor, ...]  # linf: the least and the greatest point of each B(x); else x; (N, ...)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the point of B(x) nearest to `z` (N, ...) in the Euclidean distance."""
        if (
            self.threat.norm == "linf"
        ):  # the intersection of two boxes is a box, and clamp its exact projection
            return torch.clamp(z, *self.known)
        return (self.threat._project_l2 if self.threat.norm == "l2" else self.threat._project_l1)(
            z, *self.known
        )

    def box_first(self, z: Tensor) -> Tensor:
        """Return a point of B(x) for `z` (N, ...); in l2 not the nearest: into the box, then towards x into the ball.

        Of a step that leaves the ball, those coordinates that shoot through their walls do not end at them, as they
        would by the nearest point: they shrink with the others.
        """
        if self.threat.norm != "l2":
            return self(z)
        (x,) = self.known
        delta = z.clamp(self.threat.low, self.threat.high) - x
        length = self.threat.length(delta).clamp_min(torch.finfo(x.dtype).tiny)
        most = torch.as_tensor(self.threat.per_sample(self.threat.eps, x), dtype=x.dtype, device=x.device)
        share = (most / alongside(length, x)).clamp_max(1)
        return torch.addcmul(x, delta, share).clamp_(self.threat.low, self.threat.high)

    def take(self, index: Tensor) -> Projection:
        """Return the projection of these samples: `index` (M,) int64 or (N,) bool."""
        return Projection(self.threat.rows(index), tuple(known[index] for known in self.known))

    def join(self, others: Sequence[Projection]) -> Projection:
        """Return the projection of these samples and the others'."""
        columns = zip(self.known, *(other.known for other in others), strict=True)
        threat = self.threat.join([other.threat for other in others])
        return Projection(threat, tuple(torch.cat(column) for column in columns))
