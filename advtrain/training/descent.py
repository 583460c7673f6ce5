"""A step of training with a part of the batch for each core: the gradients of its objective, and the attack before."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from advtrain.attacks import GradientAttack
from advtrain.cores import Ahead, cut, side_by_side
from advtrain.models.known import KNOWN
from advtrain.models.recorded import Pass, Passes
from advtrain.objective import Objective
from advtrain.threat import ThreatModel


def _terms(objective: Objective) -> Hashable | None:
    if not objective.recordable:
        return None
    weights, terms = tuple(objective.weights.items()), tuple(objective.terms.items())
    return objective.config, weights, terms, objective.target_scale


KNOWN[Objective] = _terms


class PartsDescent:
    """Gradients of an objective in which each sample stands for itself, by recorded passes.

    Its calls fill the parameters' gradients and return the objective's sums; or None, with nothing done, where the pass
    cannot be recorded. In Python the parts would wait for each other, and the attack of one would put the network that
    the other descends into another state.
    """

    def __init__(self, objective: Objective, cores: int) -> None:
        self.objective, self.cores = objective, cores
        self.parameters = list(objective.parameters())
        self.ahead = Ahead(cores)  # begun behind the parts of a climb: the draws of the next step's attack

    def __call__(self, x: Tensor, x_adv: Tensor | None, y: Tensor, factor: float) -> dict[str, Tensor] | None:
        """Fill the gradients with those of `factor` times the objective's sum."""

        def descend(objective: Objective, x: Tensor, y: Tensor, *attacked: Tensor) -> dict[str, Tensor]:
            return _gradients(objective, x, attacked[0] if attacked else None, y, factor)

        batch = (x, y) if x_adv is None else (x, y, x_adv)
        return self._fill(descend, ("descend", factor), batch)

    def after_climb(
        self,
        attack: GradientAttack,  # that is one climb
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        drawn: Sequence[Tensor],  # what the attack's `draw` gave
        factor: float,
    ) -> dict[str, Tensor] | None:
        """Do the same at the inputs to which the attack climbs, each core both for its part of the batch."""
        if threat.shares is not None:  # a radius for each sample
            return None

        def climb_and_descend(
            objective: Objective, x: Tensor, y: Tensor, *drawn: Tensor
        ) -> dict[str, Tensor]:
            x_adv = attack.climb(objective.model, x, y, threat, drawn)
            return _gradients(objective, x, x_adv, y, factor)

        same = ("climb", attack.config, attack.batch_norm, threat, factor)
        return self._fill(climb_and_descend, same, (x, y, *drawn), self.ahead.begin)

    def _fill(
        self,
        function: Pass,
        same: Hashable,
        batch: Sequence[Tensor],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor] | None:
        passes = Passes(self.objective, often=1)
        parts = [[tensor[rows] for tensor in batch] for rows in cut(batch[0], self.cores)]
        recordings = [passes.recording(function, same, *part) for part in parts]
        known = [recording for recording in recordings if recording is not None]
        if len(known) < len(parts):
            return None

        def run(number: int) -> dict[str, Tensor]:
            if number == 0:  # the other cores have theirs already
                meanwhile()
            return passes.run(known[number], *parts[number])

        first, *others = side_by_side(run, range(len(parts)))
        values = list(first.values())
        for other in others:
            values = list(torch._foreach_add(values, list(other.values())))
        totals = dict(zip(first, values, strict=True))
        for number, parameter in enumerate(self.parameters):
            gradient = totals.pop(str(number), None)
            parameter.grad = None if gradient is None else _beside(parameter, gradient)
        return totals


def _gradients(
    objective: Objective, x: Tensor, x_adv: Tensor | None, y: Tensor, factor: float
) -> dict[str, Tensor]:
    """Return the objective's sums, and the gradients of what is trained by the numbers of the parameters."""
    sums: dict[str, Tensor]
    loss, sums = objective(x, x_adv, y)
    trained = {str(number): p for number, p in enumerate(objective.parameters()) if p.requires_grad}
    gradients = torch.autograd.grad(loss.sum() * factor, list(trained.values()))
    return sums | dict(zip(trained, gradients, strict=True))


def _beside(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return the gradient in the parameter's order: fused optimizers walk both side by side in memory."""
    if parameter.stride() == gradient.stride():
        return gradient
    strides = zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    if all(one == other for size, one, other in strides if size > 1):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
