"""Transfer attack: adversarial examples of a second model are tried on the evaluated model.

It needs no gradient of the evaluated model (Papernot et al. 2016, arXiv 1605.07277). The examples are made with
momentum, which transfers best (MI-FGSM, Dong et al. 2018, arXiv 1710.06081).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import in_parts
from advtrain.attacks.base import InputSearch, attack_mode, predictions
from advtrain.attacks.checks import checked
from advtrain.attacks.pgd import GradientAttack
from advtrain.recipe.attack import AttackConfig
from advtrain.threat import ThreatModel

#: Losses that are maximized on the other model in turn.
LOSSES = ("ce", "margin")


def momentum_attack(loss: str, num_steps: int) -> GradientAttack:
    """Return the attack on the other model."""
    values = {"num_steps": num_steps, "momentum": 1.0, "loss": loss}
    return GradientAttack(AttackConfig.model_validate(values))


class Loadable(Protocol):
    """Serialized model that any process can load, such as `models.serialized.ModelSource`."""

    @property
    def digest(self) -> str:
        """SHA-256 digest of the serialized model."""
        ...

    def load(self) -> nn.Module:
        """Return the model on the CPU."""
        ...


class TransferAttack(InputSearch):
    """Attack that maximizes another model's cross-entropy in round 0 and its margin in round 1."""

    kind = "transfer"  # refuses perturbed embeddings: the other model has another embedding

    def __init__(self, source: Loadable, num_steps: int = 50) -> None:
        self.source, self.num_steps, self.num_rounds = source, num_steps, len(LOSSES)
        self._model: nn.Module | None = None

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"transfer-{self.source.digest[:6]}-{self.num_steps}"

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
        """Run round `number` and return (x_adv (N, ...), fooled (N,) bool)."""
        model = checked(model, x, y, threat)
        if self._model is None:
            self._model = self.source.load()
        attack = momentum_attack(LOSSES[number], self.num_steps)
        source = self._model.to(x.device)

        def search(x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
            x_adv = attack(source, x, y, threat, generator)
            with attack_mode(model), torch.no_grad():
                return x_adv, predictions(model(x_adv).float()) != y

        return in_parts(search, x, y, threat, batch_size)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_model": None}
