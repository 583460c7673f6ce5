"""Auto-PGD for l1 (Croce & Hein 2021, "Mind the box", arXiv 2103.01208, section 4).

An l1 step along a single coordinate is slow, and a step along all coordinates is weak. Here a step moves the k
coordinates with the largest gradients by equal amounts, and k follows the sparsity of the best point so far.
The search runs at three and two times the radius first (section 4.3). Each phase starts at the projection of the
previous phase's best point. Only iterates at the radius itself count as adversarial examples. Where paper and authors'
code differ, this follows the code. Two deviations (`docs/explanation/deviations.md`): coordinates at the box boundary
whose gradient points outward are skipped, and k is rounded to the nearest integer, not up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advtrain.attacks.active_batches import Attacked, Climb, Climbing, advance
from advtrain.threat import ThreatModel, alongside

#: Radii in multiples of eps, and the fraction of the iterations of each phase but the last.
RADII, SHARE = (3.0, 2.0, 1.0), 0.3
#: Check interval (of a phase), and the ratio of sparsities below which the step is reset.
CHECK_SHARE, SPARSER = 0.04, 0.95
#: Divisor of k and of the step, and the smallest step (of the radius).
SHRINK, SMALLEST = 1.5, 0.1


@dataclass
class _Climbing(Climbing):
    """State of the samples that are still robust; `best` is that of the current phase."""

    sparsity: Tensor  # (n,) float: changed coordinates of the best point at the last check
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
        sparsity=_changed(z, x),
        eta=torch.ones(n, device=device),
    )


def phases(num_steps: int) -> list[tuple[float, int]]:
    """Return the radius in multiples of eps and the number of steps of each phase."""
    steps = math.ceil(SHARE * num_steps)
    return list(zip(RADII, (steps, steps, max(1, num_steps - 2 * steps)), strict=True))


def climb_l1(climb: Climb, batches: Sequence[Attacked]) -> None:
    """Run all phases from random starts; samples broken at the radius itself leave early."""
    widest = climb.threat.scaled(RADII[0])
    climbing = [_begin(batch, _start(batch.x, climb.generator), widest) for batch in batches]
    for factor, num_steps in phases(climb.num_steps):
        ball, counts = climb.threat.scaled(factor), factor == 1
        climbing = [_begin(state, state.best, ball) for state in climbing]
        every = max(1, int(CHECK_SHARE * num_steps))
        for number in range(num_steps + 1):

            def step(
                state: _Climbing,
                ball: ThreatModel = ball,
                counts: bool = counts,
                check: bool = number > 0 and number % every == 0,
                last: bool = number == num_steps,
            ) -> _Climbing:
                gradient, logits = climb.ask(state.z, state.loss)
                if counts:
                    state, gradient, logits = climb.drop_fallen(state, gradient, logits)
                state.note(gradient, state.loss(logits, state.z))
                if last:
                    return state
                if check:
                    gradient = _adapt(state, gradient)
                around = ball.rows(state.rows)
                state.z = around.project(state.z + sparse_step(state, gradient, around), state.x)
                return state

            climbing = advance(climbing, step, climb.batch_size)


def _start(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return x + torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _changed(z: Tensor, x: Tensor) -> Tensor:
    """Return the number of coordinates in which z differs from x, (N,) float."""
    return (z != x).flatten(1).sum(1).float()


def _adapt(state: _Climbing, gradient: Tensor) -> Tensor:
    """Reset the step where the best point is sparser than at the last check, else shorten it.

    After a reset the iterate restarts from the best point. Returns the gradients for the next step.
    """
    sparsity = _changed(state.best, state.x)
    sparser = sparsity < SPARSER * state.sparsity
    state.eta = torch.where(sparser, 1.0, (state.eta / SHRINK).clamp_min(SMALLEST))
    again = alongside(sparser, state.z)
    state.z = torch.where(again, state.best, state.z)
    state.sparsity = sparsity
    return torch.where(again, state.best_gradient, gradient)


def sparse_step(state: _Climbing, gradient: Tensor, ball: ThreatModel) -> Tensor:
    """Return eta eps sign(g) / k on the k largest entries of |g| that can move, (n, ...).

    k is the sparsity divided by SHRINK.
    """
    g, at = ball.where_free(gradient, 0.0).flatten(1), state.z.flatten(1)
    blocked = ((at <= ball.low) & (g < 0)) | ((at >= ball.high) & (g > 0))
    size = torch.where(blocked, 0, g.abs())
    count = (state.sparsity / SHRINK).round().clamp(1, g.shape[1]).long().unsqueeze(1)
    least = size.sort(dim=1, descending=True).values.gather(1, count - 1)
    chosen = (size >= least) & (size > 0)
    parts = g.sign() * chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return (parts * (state.eta * ball.eps).unsqueeze(1)).view_as(gradient)
