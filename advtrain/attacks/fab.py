"""FAB-T: the nearest point of the boundary towards one class after another (Croce & Hein 2020, arXiv 1907.02044).

Where other attacks climb a loss inside a ball, FAB walks along the boundary towards the clean input, on linearisations
of the difference of two logits, and so finds a small perturbation whatever the radius is. As a judge it fools the
model on a sample if what it finds lies within eps. Targeted as in AutoAttack: towards each of the 9 likeliest wrong
classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advtrain.attacks.base import attacked, input_gradient, likeliest_wrong, predictions, within
from advtrain.attacks.losses import build_lead
from advtrain.threat import ThreatModel

#: The paper's parameters: largest weight of the clean input's projection, overshoot, backward step.
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9


def boundary_step(x: Tensor, w: Tensor, c: Tensor, threat: ThreatModel) -> Tensor:
    """Return the point of {z : w . (z - x) = c, low <= z <= high} nearest to `x` in the threat model's norm, (N, d).

    Each coordinate moves towards the plane by a length that grows with one multiplier t per sample, up to its wall:
    t (linf), t |w_i| (l2); l1 fills coordinates in the order of |w_i|. w . (z - x) is then concave and piecewise linear
    in t, so that Newton's steps from below meet the solution exactly, after as many as walls are met one after another.
    Where even all walls do not reach the plane, all coordinates end at their walls.
    """
    towards = w.sign() * c.sign().unsqueeze(1)  # raises w . z towards c
    size, need = w.abs(), c.abs().unsqueeze(1)
    room = torch.where(towards > 0, threat.high - x, x - threat.low).clamp_min_(0).mul_(size > 0)
    gain = room * size
    tiny = torch.finfo(x.dtype).tiny
    if threat.norm == "l1":
        order = size.argsort(dim=1, descending=True)
        sorted_gain = gain.gather(1, order)
        left = (need - (sorted_gain.cumsum(1) - sorted_gain)).clamp_min(0)
        moved = torch.minimum(room.gather(1, order), left / size.gather(1, order).clamp_min(tiny))
        return x + towards * torch.zeros_like(room).scatter_(1, order, moved)
    # Scaled to a largest entry of 1: squares of tiny entries would underflow.
    rate = (
        torch.ones_like(size) if threat.norm == "linf" else size / size.amax(1, keepdim=True).clamp_min(tiny)
    )
    slopes, all_gain, t = rate * size, gain.sum(1, keepdim=True), torch.zeros_like(need)
    while True:
        free = (t * rate < room).to(x.dtype)  # coordinates that have not met their walls
        slope, not_yet = ((part * free).sum(1, keepdim=True) for part in (slopes, gain))
        ahead = torch.where(slope > 0, (need - all_gain + not_yet) / slope.clamp_min(tiny), t)
        if not (ahead > t * (1 + 1e-6)).any():
            break
        t = torch.maximum(ahead, t)
    return torch.addcmul(x, towards, torch.minimum(t * rate, room).where(slope > 0, room))


class FastAdaptiveBoundary:
    """FAB towards the likeliest wrong classes, one a round."""

    def __init__(self, num_steps: int = 100, num_targets: int = 9) -> None:
        self.num_steps, self.num_rounds = num_steps, num_targets

    @property
    def name(self) -> str:
        """As the report shows it."""
        return f"fab-t-{self.num_steps}x{self.num_rounds}"

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Round `number`: return (x_adv (N, ...), fooled (N,) bool)."""
        found, distance = self.find_nearest(model, x, y, threat, number)
        return within(found, distance, x, threat)

    def find_nearest(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest misclassified point found (N, ...), and its distance (N,), infinite if there is none.

        Algorithm 1 of the paper; of the threat model the norm and the box alone count.
        """
        with attacked(model):
            with torch.no_grad():
                logits = model(x).float()
            best, distance = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
            target = likeliest_wrong(logits, y, number)
            if target is None:
                return best, distance
            towards = build_lead(y, target)
            z, shape, flat = x, x.shape, x.flatten(1)
            for _ in range(self.num_steps):
                gradient, logits = input_gradient(model, z, towards)
                w, gap, here = gradient.flatten(1), towards(logits, z), z.flatten(1)
                # Both steps to the plane {w . (z' - z) = -gap} in one call: from z, and from the clean input.
                starts, planes = torch.cat([here, flat]), torch.cat([w, w])
                left = torch.cat([-gap, -gap - (w * (flat - here)).sum(1)])
                moves = boundary_step(starts, planes, left, threat) - starts
                to_plane, from_clean = moves.chunk(2)
                step, origin = threat.distance(moves, torch.zeros_like(moves)).chunk(2)
                alpha = (step / (step + origin).clamp_min(1e-12)).clamp_max(ALPHA_MAX).unsqueeze(1)
                z = (1 - alpha) * (here + ETA * to_plane) + alpha * (flat + ETA * from_clean)
                z = z.clamp(threat.low, threat.high).view(shape)
                with torch.no_grad():
                    fools = predictions(model(z).float()) != y
                size = threat.distance(z, x)
                nearer = fools & (size < distance)
                distance = torch.where(nearer, size, distance)
                wide = (len(x), *[1] * (x.dim() - 1))
                best = torch.where(nearer.view(wide), z, best)
                z = torch.where(fools.view(wide), (1 - BETA) * x + BETA * z, z)
            return best, distance
