"""Auto-PGD for l1 (Croce & Hein 2021, "Mind the box", arXiv 2103.01208, section 4).

An l1 step along a single coordinate is slow, along all of them weak. Here a step moves the k coordinates of the
largest gradient by equal parts, and k follows the sparsity of the best point so far. Coordinates at a wall that their
gradient pushes against do not count. The first iterations run at three and two times the radius (their section 4.3);
only those at the radius itself count as found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advtrain.attacks.losses import AttackLoss
from advtrain.threat import ThreatModel

#: Radii in multiples of eps, and their shares of the iterations.
PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
#: The first k, of all coordinates; between checks, of a phase; what a check divides by; the smallest step, of eps.
FIRST_SHARE, CHECK_SHARE, SHRINK, SMALLEST = 0.2, 0.04, 1.5, 0.1

#: z -> gradient of the loss, logits; and (iterates, logits, rows) -> which of them fool the model, kept if so.
Ask = Callable[[Tensor, AttackLoss], tuple[Tensor, Tensor]]
Keep = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class _State:
    """What is known of each sample that still climbs; every tensor has a row for it."""

    rows: Tensor  # its number in the batch
    x: Tensor
    z: Tensor
    best: Tensor  # the iterate of the highest loss in this phase
    best_gradient: Tensor
    best_loss: Tensor  # (n,)
    k: Tensor  # (n,) float: coordinates that a step moves
    eta: Tensor  # (n,) length of a step, in multiples of the phase's radius

    def take(self, going: Tensor) -> _State:
        return _State(**{name: value[going] for name, value in vars(self).items()})


def climb_l1(
    ask: Ask,
    keep: Keep,
    x: Tensor,  # (N, ...)
    loss: AttackLoss,
    threat: ThreatModel,
    generator: torch.Generator | None,
    num_steps: int,
) -> None:
    """Climb `loss` from a random start through all phases; iterates at the radius go to `keep`."""
    z, size = threat.scaled(PHASES[0][0]).random_start(x, generator), x.flatten(1).shape[1]
    for factor, share in PHASES:
        ball = threat.scaled(factor)
        state = _State(
            rows=torch.arange(len(x), device=x.device),
            x=x,
            z=ball.project(z, x),
            best=z,
            best_gradient=torch.zeros_like(z),
            best_loss=torch.full((len(x),), float("-inf"), device=x.device),
            k=torch.full((len(x),), FIRST_SHARE * size, device=x.device),
            eta=torch.ones(len(x), device=x.device),
        )
        z = _climb(ask, keep if factor == 1 else None, state, loss, ball, max(1, round(share * num_steps)))


def _climb(
    ask: Ask, keep: Keep | None, state: _State, loss: AttackLoss, ball: ThreatModel, num_steps: int
) -> Tensor:
    """Climb within one ball; return the best iterates (N, ...), of the samples that are left."""
    every = max(1, math.ceil(CHECK_SHARE * num_steps))
    for step in range(num_steps):
        gradient, logits = ask(state.z, loss)
        if keep is not None:
            going = ~keep(state.z, logits, state.rows)
            if not going.all():
                state, loss, gradient, logits = (
                    state.take(going),
                    loss.take(going),
                    gradient[going],
                    logits[going],
                )
            if len(state.rows) == 0:
                return state.best
        value = loss(logits, state.z)
        higher = value > state.best_loss
        wide = higher.view(-1, *[1] * (gradient.dim() - 1))
        state.best_loss = torch.where(higher, value, state.best_loss)
        state.best = torch.where(wide, state.z, state.best)
        state.best_gradient = torch.where(wide, gradient, state.best_gradient)
        if step and step % every == 0:
            gradient = _adapt(state, gradient)
        state.z = ball.project(state.z + sparse_step(state, gradient, ball), state.x)
    if keep is not None:
        _, logits = ask(state.z, loss)
        keep(state.z, logits, state.rows)
    return state.best


def _adapt(state: _State, gradient: Tensor) -> Tensor:
    """Set k by the best point's sparsity; shorten the step where k has settled, else begin anew from the best.

    Returns the gradients to go on with.
    """
    k = ((state.best - state.x).flatten(1) != 0).sum(1).float() / SHRINK
    settled = (k / state.k.clamp_min(1) >= 0.95) & (k <= state.k)
    state.eta = torch.where(settled, (state.eta / SHRINK).clamp_min(SMALLEST), 1.0)
    again = (~settled).view(-1, *[1] * (state.z.dim() - 1))
    state.z = torch.where(again, state.best, state.z)
    state.k = k.clamp_min(1)
    return torch.where(again, state.best_gradient, gradient)


def sparse_step(state: _State, gradient: Tensor, ball: ThreatModel) -> Tensor:
    """Return eta eps sign(g) / k on the k largest entries of |g| that can move, (n, ...)."""
    g, at = gradient.flatten(1), state.z.flatten(1)
    blocked = ((at <= ball.low) & (g < 0)) | ((at >= ball.high) & (g > 0))
    size = torch.where(blocked, 0, g.abs())
    count = state.k.round().clamp(1, g.shape[1]).long().unsqueeze(1)
    least = size.sort(dim=1, descending=True).values.gather(1, count - 1)
    chosen = (size >= least) & (size > 0)
    parts = g.sign() * chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return (parts * (state.eta * ball.eps).unsqueeze(1)).view_as(gradient)
