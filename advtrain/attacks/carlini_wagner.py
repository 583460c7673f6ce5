"""Carlini & Wagner's l2 attack: minimal perturbations by Adam and binary search (2017).

arXiv 1608.04644. Minimizes ||z - x||^2 + c max(z_y - max_{k != y} z_k, 0) over z in the box. A binary search sets the
weight c for each sample. Deviation: z is clipped to the box after each step. The paper uses z = (tanh(w) + 1) / 2,
under which pixels at 0 or 1 hardly move, and most MNIST pixels are 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import in_parts
from advtrain.attacks.base import InputSearch, attack_mode, predictions, within
from advtrain.attacks.checks import check_inputs, checked
from advtrain.attacks.losses import margin
from advtrain.recipe.suites import check_norm
from advtrain.threat import ThreatModel

LEARNING_RATE, FIRST_PRICE = 0.01, 0.01


class CarliniWagner(InputSearch):
    """C&W attack; in an evaluation it breaks a sample if the point found lies within eps."""

    kind = "cw"

    def __init__(self, num_steps: int = 200, num_searches: int = 5) -> None:
        self.num_steps, self.num_searches, self.num_rounds = num_steps, num_searches, 1

    @property
    def cost(self) -> int:
        """Largest number of forward passes of a sample; a backward pass counts as two."""
        return 3 * self.num_steps * self.num_searches

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"cw-{self.num_steps}x{self.num_searches}"

    def check(self, threat: ThreatModel) -> None:
        """Raise a UserError unless B(x) is one l2 ball around the whole input in a finite box."""
        super().check(threat)
        check_norm(self.kind, threat.norm)

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_adv (N, ...), fooled (N,) bool)."""
        self.check(threat)
        check_inputs(x, y, threat)
        found, distance = in_parts(
            lambda x, y, threat: self.find_nearest(model, x, y, threat), x, y, threat, batch_size
        )
        return within(found, distance, x, threat)

    def find_nearest(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest misclassified points found (N, ...) and their distances (N,).

        The distance is infinite where no point was found.
        """
        model = checked(model, x, y, threat)
        best, distance = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
        price = torch.full((len(x),), FIRST_PRICE, device=x.device)
        low, high = torch.zeros_like(price), torch.full_like(price, float("inf"))
        with attack_mode(model):
            for _ in range(self.num_searches):
                fooled = self._descend(model, x, y, threat, price, (best, distance))
                high = torch.where(fooled, torch.minimum(high, price), high)
                low = torch.where(fooled, low, torch.maximum(low, price))
                price = torch.where(high.isinf(), 10 * price, (low + high) / 2)
        return best, distance

    def _descend(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        price: Tensor,
        kept: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Minimize the objective at one weight `price`, and store nearer adversarial examples.

        Returns which samples were misclassified at some step, (N,) bool.
        """
        best, distance = kept
        z = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=LEARNING_RATE)
        ever = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.num_steps):
            with torch.enable_grad():
                logits = model(z).float()
                squares = (z - x).flatten(1).square().sum(1)
                total = (squares + price * (-margin(logits, y)).clamp_min(0)).sum()
            (z.grad,) = torch.autograd.grad(total, z)
            with torch.no_grad():
                fools = predictions(logits) != y
                nearer = fools & (squares.sqrt() < distance)
                best[nearer], distance[nearer] = z[nearer], squares.sqrt()[nearer]
                ever |= fools
                optimizer.step()
                z.clamp_(threat.low, threat.high)
        return ever
