"""FAB-T: the nearest point of the boundary towards one class after another (Croce & Hein 2020, arXiv 1907.02044).

Where other attacks climb a loss inside a ball, FAB walks along the boundary towards the clean input, on linearisations
of the difference of two logits, and so finds a small perturbation whatever the radius is. As a judge it fools the
model on a sample if what it finds lies within eps. Targeted as in AutoAttack: towards each of the 9 likeliest wrong
classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import Attacked, advance, parts
from advtrain.attacks.base import (
    SearchDefaults,
    attack_mode,
    check_covers_input,
    input_gradient,
    predictions,
    top_wrong_class,
    within,
)
from advtrain.attacks.losses import build_target_margin
from advtrain.threat import ThreatModel, alongside

#: The paper's parameters: largest weight of the clean input's projection, overshoot, backward step.
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9


def boundary_move(x: Tensor, w: Tensor, c: Tensor, threat: ThreatModel) -> Tensor:
    """Return z - x (N, d), z the point of {w . (z - x) = c, low <= z <= high} nearest to x in the threat model's norm.

    Each coordinate moves towards the plane by a length that grows with one multiplier t per sample, up to its wall:
    t (linf), t |w_i| (l2); l1 fills coordinates in the order of |w_i|. w . (z - x) is then concave and piecewise linear
    in t, so that Newton's steps from below meet the solution exactly, after as many as walls are met one after another.
    Where even all walls do not reach the plane, all coordinates end at their walls.
    """
    towards = w.sign().mul_(c.sign().unsqueeze(1))  # raises w . z towards c
    size, need, tiny = w.abs(), c.abs().unsqueeze(1), torch.finfo(x.dtype).tiny
    # Up to the wall. Where w_i = 0 this is half the box, which does no harm: nothing moves there.
    half = (threat.high - threat.low) / 2
    room = torch.addcmul(x.new_tensor(half), x - (threat.low + half), towards, value=-1)
    if threat.norm == "l1":
        order = size.argsort(dim=1, descending=True)
        gain = (room * size).gather(1, order)
        left = (need - (gain.cumsum(1) - gain)).clamp_min(0)
        moved = torch.minimum(room.gather(1, order), left / size.gather(1, order).clamp_min(tiny))
        return torch.zeros_like(room).scatter_(1, order, moved).mul_(towards)
    # The walls are met at the multipliers `met`; up to there a coordinate gains `gain` a unit of t. l2: scaled to a
    # largest |w_i| of 1, squares of tiny ones underflow.
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
    t = torch.where(slope > 0, t, torch.finfo(x.dtype).max)  # all are at their walls
    return torch.minimum(t if rate is None else t * rate, room).mul_(towards)


class FastAdaptiveBoundary(SearchDefaults):
    """FAB towards the likeliest wrong classes, one a round."""

    def __init__(self, num_steps: int = 100, num_targets: int = 9) -> None:
        self.num_steps, self.num_rounds = num_steps, num_targets

    @property
    def name(self) -> str:
        """As the report shows it."""
        return f"fab-t-{self.num_steps}x{self.num_rounds}"

    def check(self, threat: ThreatModel) -> None:
        """Refuse, with a UserError, a threat model without a box, or with fixed positions."""
        check_covers_input("fab-t", threat)

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
        """Round `number`: return (x_adv (N, ...), fooled (N,) bool)."""
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
        """Return the nearest misclassified point found (N, ...), and its distance (N,), infinite if there is none.

        Algorithm 1 of the paper; of the threat model the norm and the box alone count. A sample leaves with a point
        no farther than `enough`.
        """
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
    """What is known of each sample that still walks; its loss is the lead of the target over the label."""

    z: Tensor  # (n, ...): the present point


def _towards_boundary(state: _Walk, gradient: Tensor, gap: Tensor, threat: ThreatModel) -> Tensor:
    """Return the next point: between the steps to the plane {z' : w . (z' - z) = -gap} from z and from the clean
    input, with overshoot."""
    w, here, clean = gradient.flatten(1), state.z.flatten(1), state.x.flatten(1)
    away = clean - here
    left = torch.cat([-gap, -gap - (w * away).sum(1)])
    moves = boundary_move(torch.cat([here, clean]), torch.cat([w, w]), left, threat)
    from_here, from_clean = moves.chunk(2)
    step, origin = threat.length(moves).chunk(2)
    alpha = (step / (step + origin).clamp_min(1e-12)).clamp_max(ALPHA_MAX).unsqueeze(1)
    z = torch.addcmul(here, away, alpha).add_(torch.lerp(from_here, from_clean, alpha), alpha=ETA)
    return z.clamp_(threat.low, threat.high).view_as(state.z)
