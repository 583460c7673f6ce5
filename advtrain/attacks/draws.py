"""Mean over draws of a stochastic model, as a model.

Expectation over transformation (EOT), Athalye et al. 2018, arXiv 1802.00420.
"""

from __future__ import annotations

from torch import Tensor, nn

from advtrain.seeding import seeded


class MeanOfDraws(nn.Module):
    """Map x (N, ...) to the mean logits (N, K) float32 of `num_draws` passes.

    Args:
        model: the stochastic model.
        num_draws: number of passes.
        seed: seed of the global generators before the first pass, so that all calls use the same draws; the generators
            are restored afterwards. None: new draws in each call.
    """

    def __init__(self, model: nn.Module, num_draws: int, seed: int | None = None) -> None:
        super().__init__()
        self.model, self.num_draws, self.seed = model, num_draws, seed

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits (N, K) float32."""
        if self.seed is None:
            return self._mean(x)
        with seeded(x.device, self.seed):
            return self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        total = self.model(x).float()
        for _ in range(self.num_draws - 1):
            total = total + self.model(x).float()
        mean: Tensor = total / self.num_draws
        return mean
