"""Auto-PGD for l1 (Croce & Hein 2021, "Mind the box", arXiv 2103.01208, section 4).

An l1 step along a single coordinate is slow, along all of them weak. Here a step moves the k coordinates of the
largest gradient by equal parts, and k follows the sparsity of the best point so far. Coordinates at a wall that their
gradient pushes against do not count. The first iterations run at three and two times the radius (their section 4.3);
only those at the radius itself count as found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advtrain.attacks.together import Ask, Attacked, Failures, advance
from advtrain.threat import ThreatModel

#: Radii in multiples of eps, and their shares of the iterations.
PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
#: The first k, of all coordinates; between checks, of a phase; what a check divides by; the smallest step, of eps.
FIRST_SHARE, CHECK_SHARE, SHRINK, SMALLEST = 0.2, 0.04, 1.5, 0.1


@dataclass
class _Climb(Attacked):
    """What is known of each sample that still climbs."""

    z: Tensor  # (n, ...): the present iterate
    best: Tensor  # the iterate of the highest loss in this phase
    best_gradient: Tensor
    best_loss: Tensor  # (n,)
    k: Tensor  # (n,) float: coordinates that a step moves
    eta: Tensor  # (n,) length of a step, in multiples of the phase's radius


def _begin(batch: Attacked, z: Tensor, ball: ThreatModel) -> _Climb:
    x, n, device = batch.x, len(batch), batch.x.device
    z = ball.project(z, x)
    return _Climb(
        batch.rows,
        x,
        batch.y,
        batch.loss,
        z=z,
        best=z,
        best_gradient=torch.zeros_like(z),
        best_loss=torch.full((n,), float("-inf"), device=device),
        k=torch.full((n,), FIRST_SHARE * x[0].numel(), device=device),
        eta=torch.ones(n, device=device),
    )


def climb_l1(
    ask: Ask,
    failures: Failures,
    batches: Sequence[Attacked],
    threat: ThreatModel,
    generator: torch.Generator | None,
    num_steps: int,
    batch_size: int | None,
) -> None:
    """Climb from a random start through all phases; an iterate at the radius itself that fools the model ends it."""
    widest = threat.scaled(PHASES[0][0])
    climbing = [_begin(batch, widest.random_start(batch.x, generator), widest) for batch in batches]
    for factor, share in PHASES:
        ball, counts = threat.scaled(factor), factor == 1
        climbing = [_begin(state, state.best, ball) for state in climbing]
        phase = max(1, round(share * num_steps))
        every = max(1, math.ceil(CHECK_SHARE * phase))
        for number in range(phase):

            def step(
                state: _Climb,
                ball: ThreatModel = ball,
                counts: bool = counts,
                check: bool = number > 0 and number % every == 0,
            ) -> _Climb:
                gradient, logits = ask(state.z, state.loss)
                if counts:
                    going = ~failures.keep(state.rows, state.y, state.z, logits)
                    if not going.all():
                        state, gradient, logits = state.take(going), gradient[going], logits[going]
                _note(state, gradient, state.loss(logits, state.z))
                if check:
                    gradient = _adapt(state, gradient)
                state.z = ball.project(state.z + sparse_step(state, gradient, ball), state.x)
                return state

            climbing = advance(climbing, step, batch_size)
    for state in climbing:
        failures.keep(state.rows, state.y, state.z, ask(state.z, None)[1])


def _note(state: _Climb, gradient: Tensor, value: Tensor) -> None:
    """Keep the best iterate with its gradient."""
    higher = value > state.best_loss
    wide = higher.view(-1, *[1] * (gradient.dim() - 1))
    state.best_loss = torch.where(higher, value, state.best_loss)
    state.best = torch.where(wide, state.z, state.best)
    state.best_gradient = torch.where(wide, gradient, state.best_gradient)


def _adapt(state: _Climb, gradient: Tensor) -> Tensor:
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


def sparse_step(state: _Climb, gradient: Tensor, ball: ThreatModel) -> Tensor:
    """Return eta eps sign(g) / k on the k largest entries of |g| that can move, (n, ...)."""
    g, at = gradient.flatten(1), state.z.flatten(1)
    blocked = ((at <= ball.low) & (g < 0)) | ((at >= ball.high) & (g > 0))
    size = torch.where(blocked, 0, g.abs())
    count = state.k.round().clamp(1, g.shape[1]).long().unsqueeze(1)
    least = size.sort(dim=1, descending=True).values.gather(1, count - 1)
    chosen = (size >= least) & (size > 0)
    parts = g.sign() * chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return (parts * (state.eta * ball.eps).unsqueeze(1)).view_as(gradient)
