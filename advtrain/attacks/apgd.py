"""Auto-PGD: gradient ascent that sets its own step size (Croce & Hein 2020, arXiv 2003.01690, algorithm 1).

- `apgd-ce`   climbs the cross-entropy
- `apgd-dlr`  climbs the difference of logits ratio, which no rescaling of the logits changes (eq. 6)
- `apgd-t`    climbs the targeted ratio (eq. 7) towards each of the 9 likeliest wrong classes in turn

l1 has a climb of its own, see `apgd_l1.py`. Of a stochastic model the gradient and the logits are means over draws
(EOT, Athalye et al. 2018, arXiv 1802.00420): `eot-apgd-ce`, `eot-apgd-dlr`.

Deviation: for evaluation alone, so a sample leaves the batch with the first iterate that fools the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advtrain.attacks.apgd_l1 import climb_l1
from advtrain.attacks.base import attacked, input_gradient, likeliest_wrong, predictions
from advtrain.attacks.losses import ATTACK_LOSSES, AttackLoss, build_targeted_dlr
from advtrain.threat import ThreatModel

#: Weight of the plain step against the momentum, and the share of steps that must raise the loss.
ALPHA, RHO = 0.75, 0.75


def checkpoints(num_steps: int) -> list[int]:
    """Return the steps at which the step size may be halved: w_j = ceil(p_j N), p_1 = 0.22, gaps shrinking by 0.03
    to 0.06 (section 3.2)."""
    before, now, steps = 0.0, 0.22, []
    while now <= 1:
        steps.append(math.ceil(now * num_steps - 1e-9))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return steps


@dataclass
class _Climb:
    """What is known of each sample that still climbs; every tensor has a row for it."""

    rows: Tensor  # its number in the batch
    x: Tensor  # the clean input
    y: Tensor
    z: Tensor  # the present iterate
    previous: Tensor  # the one before
    best: Tensor  # the iterate of the highest loss
    best_gradient: Tensor
    best_loss: Tensor  # (n,)
    last_loss: Tensor  # (n,): at the iterate before
    best_at_checkpoint: Tensor  # (n,): best_loss at the last checkpoint
    eta: Tensor  # (n,) step size, in multiples of eps
    halved: Tensor  # (n,) bool: at the last checkpoint
    rises: Tensor  # (n,) steps since the last checkpoint that raised the loss

    def take(self, going: Tensor) -> _Climb:
        """Return the climb of these samples alone."""
        return _Climb(**{name: value[going] for name, value in vars(self).items()})


def _keep(z: Tensor, logits: Tensor, y: Tensor, rows: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """Record the iterates that fool the model at their rows; return which do, (n,) bool."""
    found, fooled = kept
    new = predictions(logits) != y
    found[rows[new]] = z[new]
    fooled[rows[new]] = True
    return new


class AutoPGD:
    """One loss, or the targeted ratio towards several classes, with a number of starts."""

    def __init__(
        self,
        loss: str,
        *,
        num_steps: int = 100,
        num_restarts: int = 1,
        num_targets: int = 9,
        num_draws: int = 1,
    ) -> None:
        self.loss, self.num_steps, self.num_draws = loss, num_steps, num_draws
        #: Rounds over the samples that still stand: starts, or targets.
        self.num_rounds = num_targets if loss == "t" else num_restarts

    @property
    def name(self) -> str:
        """As the report shows it."""
        if self.num_draws > 1:
            return f"eot-apgd-{self.loss}-{self.num_steps}x{self.num_draws}"
        restarts = f"x{self.num_rounds}" if self.num_rounds > 1 else ""
        return f"apgd-{self.loss}-{self.num_steps}{restarts}"

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Round `number`: return (x_adv (N, ...), fooled (N,) bool); every iterate counts."""
        with attacked(model):
            loss = self._loss(model, x, y, number)
            found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
            if loss is not None and threat.norm == "l1":
                climb_l1(
                    lambda z, loss: self._ask(model, z, loss),
                    lambda z, logits, rows: _keep(z, logits, y[rows], rows, (found, fooled)),
                    x,
                    loss,
                    threat,
                    generator,
                    self.num_steps,
                )
            elif loss is not None:
                self._climb(model, x, y, threat, loss, generator, (found, fooled))
            return found, fooled

    def _ask(self, model: nn.Module, z: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        """Return gradients and logits at z, means over draws."""
        gradient, logits = input_gradient(model, z, loss)
        for _ in range(self.num_draws - 1):
            again, others = input_gradient(model, z, loss)
            gradient, logits = gradient + again, logits + others
        return gradient / self.num_draws, logits / self.num_draws

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, number: int) -> AttackLoss | None:
        if self.loss != "t":
            return ATTACK_LOSSES[self.loss](model, x, y)
        with torch.no_grad():
            logits = model(x).float()
        target = likeliest_wrong(logits, y, number)
        return None if target is None else build_targeted_dlr(y, target)

    def _climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        loss: AttackLoss,
        generator: torch.Generator | None,
        kept: tuple[Tensor, Tensor],
    ) -> None:
        start = threat.random_start(x, generator)
        n, flags = len(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        floor = torch.full((n,), float("-inf"), device=x.device)
        state = _Climb(
            rows=torch.arange(n, device=x.device),
            x=x,
            y=y,
            z=start,
            previous=start,
            best=start,
            best_gradient=torch.zeros_like(x),
            best_loss=floor,
            last_loss=torch.full((n,), float("inf"), device=x.device),  # the start is no rise
            best_at_checkpoint=floor,
            eta=torch.full((n,), 2.0, device=x.device),
            halved=flags,
            rises=torch.zeros(n, device=x.device),
        )
        marks, last_mark = checkpoints(self.num_steps), 0
        for step in range(self.num_steps):
            gradient, logits = self._ask(model, state.z, loss)
            going = ~_keep(state.z, logits, state.y, state.rows, kept)
            if not going.all():
                state, loss, gradient, logits = (
                    state.take(going),
                    loss.take(going),
                    gradient[going],
                    logits[going],
                )
            if len(state.rows) == 0:
                return
            self._note(state, gradient, loss(logits, state.z))
            if step in marks:
                gradient = self._adapt(state, gradient, step - last_mark)
                last_mark = step
            self._move(state, gradient, threat, first=step == 0)
        with torch.no_grad():
            logits = sum(model(state.z).float() for _ in range(self.num_draws)) / self.num_draws
        _keep(state.z, logits, state.y, state.rows, kept)

    def _note(self, state: _Climb, gradient: Tensor, value: Tensor) -> None:
        """Count a rise of the loss, and keep the best iterate with its gradient."""
        state.rises = state.rises + (value > state.last_loss)
        state.last_loss = value
        higher = value > state.best_loss
        state.best_loss = torch.where(higher, value, state.best_loss)
        wide = higher.view(-1, *[1] * (gradient.dim() - 1))
        state.best = torch.where(wide, state.z, state.best)
        state.best_gradient = torch.where(wide, gradient, state.best_gradient)

    def _adapt(self, state: _Climb, gradient: Tensor, since: int) -> Tensor:
        """At a checkpoint: halve the step size where progress was poor, and go back to the best iterate there.

        Conditions 1 and 2 of section 3.2. Returns the gradients to go on with.
        """
        stuck = ~state.halved & (state.best_at_checkpoint >= state.best_loss)
        poor = (state.rises < RHO * since) | stuck
        state.eta = torch.where(poor, state.eta / 2, state.eta)
        wide = poor.view(-1, *[1] * (gradient.dim() - 1))
        state.z = torch.where(wide, state.best, state.z)
        state.previous = torch.where(wide, state.best, state.previous)
        state.halved, state.best_at_checkpoint = poor, state.best_loss
        state.rises = torch.zeros_like(state.rises)
        return torch.where(wide, state.best_gradient, gradient)

    def _move(self, state: _Climb, gradient: Tensor, threat: ThreatModel, *, first: bool) -> None:
        """z_{k+1} = Proj(z_k + alpha (u - z_k) + (1 - alpha) (z_k - z_{k-1})), u = Proj(z_k + eta steepest)."""
        step = threat.per_sample(state.eta)  # eta eps along the steepest direction, for each sample
        ahead = threat.project(step.step(state.z, gradient, threat.eps), state.x)
        if not first:
            ahead = state.z + ALPHA * (ahead - state.z) + (1 - ALPHA) * (state.z - state.previous)
            ahead = threat.project(ahead, state.x)
        state.previous, state.z = state.z, ahead
