"""A step of training with a part of the batch for each core: the gradients of its objective, and the attack before."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

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
    """Gradients of an objective in which each sample stands for itself, through a network that can be recorded.

    Layers, their settings and what is trained are those of the first call, and of the first after each `look_again`.
    """

    def __init__(self, objective: Objective, cores: int) -> None:
        self.objective, self.cores = objective, cores
        self._passes: Passes | None = None
        self.ahead = Ahead(
            cores
        )  # begun behind the parts of a climb: the next batch, and draws of its attack

    def look_again(self) -> None:
        """See what has changed of network and objective, other than the values of weights."""
        self._passes = None

    def __call__(self, x: Tensor, x_adv: Tensor | None, y: Tensor, factor: float) -> dict[str, Tensor]:
        """Fill the parameters' gradients with those of `factor` times the objective's sum; return its sums."""

        def descend(objective: Objective, x: Tensor, y: Tensor, *attacked: Tensor) -> dict[str, Tensor]:
            return _gradients(objective, x, attacked[0] if attacked else None, y, factor)

        batch = (x, y) if x_adv is None else (x, y, x_adv)
        passes, _ = self._cut(descend, ("descend", factor), batch)
        return self._fill(passes)

    def after_climb(
        self,
        attack: GradientAttack,  # that is one climb
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,  # the same for all samples
        drawn: Sequence[Tensor],  # what the attack's `draw` gave
        factor: float,
    ) -> dict[str, Tensor] | None:
        """Do the same at the inputs to which the attack climbs, each core both for its part of the batch.

        Returns None, with nothing done, where attack and descent together cannot be recorded: run in Python, the
        attack of one part would put the network that the other descends into another state.
        """

        def climb_and_descend(
            objective: Objective, x: Tensor, y: Tensor, *drawn: Tensor
        ) -> dict[str, Tensor]:
            x_adv = attack.climb(objective.model, x, y, threat, drawn)
            return _gradients(objective, x, x_adv, y, factor)

        same = ("climb", attack.config, attack.batch_norm, threat, factor)
        passes, recorded = self._cut(climb_and_descend, same, (x, y, *drawn))
        return self._fill(passes, self.ahead.begin) if recorded else None

    def _cut(
        self, function: Pass, same: Hashable, batch: Sequence[Tensor]
    ) -> tuple[list[partial[dict[str, Tensor]]], bool]:
        """Return each part's pass, and whether all are recorded."""
        if self._passes is None:
            self._passes = Passes(self.objective, often=1)
        network = self._passes
        network.with_new_weights()
        parts = [[tensor[rows] for tensor in batch] for rows in cut(batch[0], self.cores)]
        recordings = [network.recording(function, same, *part) for part in parts]
        passes = [
            partial(function, self.objective, *part) if known is None else partial(network.run, known, *part)
            for known, part in zip(recordings, parts, strict=True)
        ]
        return passes, None not in recordings

    def _fill(
        self,
        passes: Sequence[partial[dict[str, Tensor]]],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor]:
        def run(number: int) -> dict[str, Tensor]:
            if number == 0:  # the other cores have theirs already
                meanwhile()
            return passes[number]()

        first, *others = side_by_side(run, range(len(passes)))
        names, totals = list(first), list(first.values())
        for other in others:
            totals = list(torch._foreach_add(totals, list(other.values())))
        for parameter in self.objective.parameters():
            parameter.grad = _beside(parameter, totals.pop(0)) if parameter.requires_grad else None
        return dict(zip(names[-len(totals) :], totals, strict=True))


def _gradients(
    objective: Objective, x: Tensor, x_adv: Tensor | None, y: Tensor, factor: float
) -> dict[str, Tensor]:
    """Return the gradients, by the numbers of their parameters, and then the objective's sums."""
    sums: dict[str, Tensor]
    loss, sums = objective(x, x_adv, y)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss.sum() * factor, trained)
    return {str(number): gradient for number, gradient in enumerate(gradients)} | sums


def _beside(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return the gradient in the parameter's order: fused optimizers walk both side by side in memory."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
