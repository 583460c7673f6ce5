"""The gradients of a step's objective, a part of the batch for each core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advtrain.cores import cut, side_by_side
from advtrain.models.recorded import KNOWN, Passes
from advtrain.objective import Objective

KNOWN.add(Objective)


class PartsDescent:
    """Gradients of an objective in which each sample stands for itself, through a network that can be recorded."""

    def __init__(self, objective: Objective, cores: int) -> None:
        self.objective, self.cores = objective, cores
        self._names: list[str] = []

    def __call__(self, x: Tensor, x_adv: Tensor | None, y: Tensor, factor: float) -> dict[str, Tensor]:
        """Fill the parameters' gradients with those of `factor` times the objective's sum; return its sums."""
        passes = Passes(self.objective, often=1)

        def there_and_back(
            objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
            parameters: Sequence[Tensor],
            *batch: Tensor,
        ) -> list[Tensor]:
            x, y = batch[0], batch[-1]
            loss, sums = objective(x, batch[1] if len(batch) == 3 else None, y)
            self._names = list(sums)
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            return [*torch.autograd.grad(loss.sum() * factor, trained), *sums.values()]

        def part(rows: slice) -> Sequence[Tensor]:
            return passes(there_and_back, factor, *(tensor[rows] for tensor in batch))

        batch = (x, y) if x_adv is None else (x, x_adv, y)
        first, *others = side_by_side(part, cut(x, self.cores))
        totals = [sum(values[1:], values[0]) for values in zip(first, *others, strict=True)]
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        for parameter, gradient in zip(parameters, totals, strict=False):
            # fused optimizers walk both side by side in memory
            alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
        return dict(zip(self._names, totals[len(parameters) :], strict=True))
