"""Auto-PGD for l1 (Croce & Hein 2021, "Mind the box", arXiv 2103.01208, section 4).

An l1 step along a single coordinate is slow, and a step along all coordinates is weak. Here a step moves the k
coordinates with the largest gradients by equal amounts, and k follows the sparsity of the best point so far.
Coordinates at the box boundary whose gradient points outward are skipped. The first iterations run at three and two
times the radius (section 4.3). Only iterates at the radius itself count as adversarial examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advtrain.attacks.active_batches import Attacked, Climb, Climbing, advance
from advtrain.threat import ThreatModel, alongside

#: Radii in multiples of eps, and their fractions of the iterations.
PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
#: Initial k (of all coordinates), check interval (of a phase), divisor at a check, smallest step (of the radius).
FIRST_SHARE, CHECK_SHARE, SHRINK, SMALLEST = 0.2, 0.04, 1.5, 0.1


@dataclass
class _Climbing(Climbing):
    """State of the samples that are still robust; `best` is that of the current phase."""

    k: Tensor  # (n,) float: number of coordinates that a step moves
    eta: Tensor  # (n,): step length in multiples of the phase's radius


def _begin(batch: Attacked, z: Tensor, ball: ThreatModel) -> _Climbing:
    x, n, device = batch.x, len(batch), batch.x.device
    z = ball.rows(batch.rows).project(z, x)
    return _Climbing(
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


def climb_l1(climb: Climb, batches: Sequence[Attacked]) -> None:
    """Run all phases from random starts; samples broken at the radius itself leave early."""
    widest = climb.threat.scaled(PHASES[0][0])
    starts = [widest.rows(batch.rows).random_start(batch.x, climb.generator) for batch in batches]
    climbing = [_begin(batch, start, widest) for batch, start in zip(batches, starts, strict=True)]
    for factor, share in PHASES:
        ball, counts = climb.threat.scaled(factor), factor == 1
        climbing = [_begin(state, state.best, ball) for state in climbing]
        phase = max(1, round(share * climb.num_steps))
        every = max(1, math.ceil(CHECK_SHARE * phase))
        for number in range(phase):

            def step(
                state: _Climbing,
                ball: ThreatModel = ball,
                counts: bool = counts,
                check: bool = number > 0 and number % every == 0,
            ) -> _Climbing:
                gradient, logits = climb.ask(state.z, state.loss)
                if counts:
                    state, gradient, logits = climb.drop_fallen(state, gradient, logits)
                state.note(gradient, state.loss(logits, state.z))
                if check:
                    gradient = _adapt(state, gradient)
                around = ball.rows(state.rows)
                state.z = around.project(state.z + sparse_step(state, gradient, around), state.x)
                return state

            climbing = advance(climbing, step, climb.batch_size)
    climb.finish(climbing)


def _adapt(state: _Climbing, gradient: Tensor) -> Tensor:
    """Set k by the best point's sparsity, and shorten the step where k has settled.

    Elsewhere the step is reset and the iterate restarts from the best point. Returns the gradients for the next step.
    """
    k = ((state.best - state.x).flatten(1) != 0).sum(1).float() / SHRINK
    settled = (k / state.k.clamp_min(1) >= 0.95) & (k <= state.k)
    state.eta = torch.where(settled, (state.eta / SHRINK).clamp_min(SMALLEST), 1.0)
    again = alongside(~settled, state.z)
    state.z = torch.where(again, state.best, state.z)
    state.k = k.clamp_min(1)
    return torch.where(again, state.best_gradient, gradient)


def sparse_step(state: _Climbing, gradient: Tensor, ball: ThreatModel) -> Tensor:
    """Return eta eps sign(g) / k on the k largest entries of |g| that can move, (n, ...)."""
    g, at = ball.where_free(gradient, 0.0).flatten(1), state.z.flatten(1)
    blocked = ((at <= ball.low) & (g < 0)) | ((at >= ball.high) & (g > 0))
    size = torch.where(blocked, 0, g.abs())
    count = state.k.round().clamp(1, g.shape[1]).long().unsqueeze(1)
    least = size.sort(dim=1, descending=True).values.gather(1, count - 1)
    chosen = (size >= least) & (size > 0)
    parts = g.sign() * chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return (parts * (state.eta * ball.eps).unsqueeze(1)).view_as(gradient)
