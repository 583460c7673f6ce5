"""FAB-T: minimal perturbations to the decision boundary, one target class at a time.

Croce & Hein 2020, arXiv 1907.02044. Other attacks maximize a loss inside a ball. FAB moves along the decision boundary
towards the clean input, on linearizations of the difference of two logits. It finds a small perturbation for any
radius. In an evaluation it breaks a sample if the point found lies within eps. As in AutoAttack, the targets are the
top 9 wrong classes, in every norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import Attacked, advance, parts
from advtrain.attacks.base import (
    InputSearch,
    attack_mode,
    input_gradient,
    predictions,
    top_wrong_class,
    within,
)
from advtrain.attacks.checks import checked
from advtrain.attacks.losses import build_target_margin
from advtrain.threat import ThreatModel, alongside

#: The paper's parameters: upper limit of the bias towards the clean input, overshoot, and backward step.
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9


def boundary_move(x: Tensor, w: Tensor, c: Tensor, threat: ThreatModel) -> Tensor:
    """Return z - x (N, d) for the point z of the hyperplane in the box that is nearest to x.

    The set is {w . (z - x) = c, low <= z <= high}; the distance is in the threat model's norm. Coordinate i moves by t
    (linf) or t |w_i| (l2), but at most to the box boundary. The multiplier t is the same for all coordinates of a
    sample. w . (z - x) is concave and piecewise linear in t, so Newton's method from below ends at the exact solution.
    For l1, coordinates move to the box boundary one after another, in decreasing order of |w_i|. If the plane does not
    intersect the box, all coordinates end at the box boundary.
    """
    towards = w.sign().mul_(c.sign().unsqueeze(1))  # moves w . z towards c
    size, need, tiny = w.abs(), c.abs().unsqueeze(1), torch.finfo(x.dtype).tiny
    # Distance to the box boundary. Where w_i = 0 it is half the box, which is harmless: nothing moves there.
    half = (threat.high - threat.low) / 2
    room = torch.addcmul(x.new_tensor(half), x - (threat.low + half), towards, value=-1)
    if threat.norm == "l1":
        order = size.argsort(dim=1, descending=True)
        gain = (room * size).gather(1, order)
        left = (need - (gain.cumsum(1) - gain)).clamp_min(0)
        moved = torch.minimum(room.gather(1, order), left / size.gather(1, order).clamp_min(tiny))
        return torch.zeros_like(room).scatter_(1, order, moved).mul_(towards)
    # Coordinate i reaches the box boundary at t = `met`. Until then it adds `gain` to w . (z - x) per unit of t.
    # l2 divides w by its largest entry first, because squares of tiny values underflow.
    if threat.norm == "linf":
        rate, met, gain = None, room, size
    else:
        rate = size / size.amax(1, keepdim=True).clamp_min(tiny)
        met, gain = room / rate.clamp_min(tiny), rate * size
    t, gained, work = torch.zeros_like(need), torch.zeros_like(need), torch.empty_like(room)
    while True:
        slope = torch.gt(met, t, out=work).mul_(gain).sum(1, keepdim=True)
        ahead = torch.where(slope > 0, t + (need - gained) / slope, t)
        if not (ahead > t * (1 + 1e-6)).any():
            break
        t = torch.maximum(ahead, t)
        gained = torch.minimum(met, t, out=work).mul_(gain).sum(1, keepdim=True)
    t = torch.where(slope > 0, t, torch.finfo(x.dtype).max)  # all coordinates are at the boundary
    return torch.minimum(t if rate is None else t * rate, room).mul_(towards)


class FastAdaptiveBoundary(InputSearch):
    """FAB-T attack: each round has one of the top wrong classes as its target."""

    kind = "fab-t"

    def __init__(self, num_steps: int = 100, num_targets: int = 9) -> None:
        self.num_steps, self.num_rounds = num_steps, num_targets

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"fab-t-{self.num_steps}x{self.num_rounds}"

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run round `number` and return (x_adv (N, ...), fooled (N,) bool)."""
        found, distance = self.find_nearest(model, x, y, threat, number, batch_size, enough=threat.eps)
        return within(found, distance, x, threat)

    def find_nearest(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        number: int = 0,
        batch_size: int | None = None,
        enough: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest misclassified points found (N, ...) and their distances (N,).

        Algorithm 1 of the paper. Only the norm and the box of the threat model are used. The distance is infinite where
        no point was found. The search for a sample ends as soon as its
        distance is at most `enough`.
        """
        model = checked(model, x, y, threat)
        best, distance = x.clone(), torch.full((len(x),), float("inf"), device=x.device)

        def step(state: _Walk) -> _Walk:
            gradient, logits = input_gradient(model, state.z, state.loss)
            z = _towards_boundary(state, gradient, state.loss(logits, state.z), threat)
            with torch.no_grad():
                fools = predictions(model(z).float()) != state.y
            size, rows = threat.distance(z, state.x), state.rows
            nearer = fools & (size < distance[rows])
            distance[rows[nearer]], best[rows[nearer]] = size[nearer], z[nearer]
            share = alongside(torch.where(fools, z.new_tensor(BETA), 1.0), x)
            state.z = torch.lerp(state.x, z, share)
            return state.without((distance[rows] <= enough).nonzero().flatten())

        with attack_mode(model):
            walking: list[_Walk] = []
            for rows in parts(x, batch_size):
                with torch.no_grad():
                    target = top_wrong_class(model(x[rows]).float(), y[rows], number)
                if target is not None:
                    walking.append(
                        _Walk(rows, x[rows], y[rows], build_target_margin(y[rows], target), x[rows])
                    )
            for _ in range(self.num_steps):
                walking = advance(walking, step, batch_size)
        return best, distance


@dataclass
class _Walk(Attacked):
    """State of the samples that are still searched; the loss is the target margin z_t - z_y."""

    z: Tensor  # (n, ...): current point


def _towards_boundary(state: _Walk, gradient: Tensor, gap: Tensor, threat: ThreatModel) -> Tensor:
    """Return the next point: a mix of two steps to the linearized boundary, with overshoot.

    The boundary is the plane {z' : w . (z' - z) = -gap}. One step starts at z, the other at the clean input.
    """
    w, here, clean = gradient.flatten(1), state.z.flatten(1), state.x.flatten(1)
    away = clean - here
    left = torch.cat([-gap, -gap - (w * away).sum(1)])
    moves = boundary_move(torch.cat([here, clean]), torch.cat([w, w]), left, threat)
    from_here, from_clean = moves.chunk(2)
    step, origin = threat.length(moves).chunk(2)
    alpha = (step / (step + origin).clamp_min(1e-12)).clamp_max(ALPHA_MAX).unsqueeze(1)
    z = torch.addcmul(here, away, alpha).add_(torch.lerp(from_here, from_clean, alpha), alpha=ETA)
    return z.clamp_(threat.low, threat.high).view_as(state.z)
