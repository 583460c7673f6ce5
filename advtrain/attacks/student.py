"""Transfer from a student that is taught on the predicted classes of the attacked model.

Papernot et al. 2017 (arXiv 1602.02697). The student is a small network of our own, so its gradients are not masked. It
needs no score and no gradient of the attacked model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks.active_batches import parts
from advtrain.attacks.base import InputSearch, logits_of, predictions
from advtrain.attacks.checks import checked
from advtrain.attacks.transfer import LOSSES, momentum_attack
from advtrain.seeding import seeded
from advtrain.threat import ThreatModel

#: Width of the student's first layer, samples per step, and learning rate of Adam.
WIDTH, BATCH, RATE = 32, 64, 2e-3


class StudentTransfer(InputSearch):
    """Attack on a student: its cross-entropy and its margin are maximized with momentum."""

    kind = "student"

    def __init__(self, num_steps: int = 50, num_epochs: int = 20) -> None:
        self.num_steps, self.num_epochs, self.num_rounds = num_steps, num_epochs, 1

    @property
    def cost(self) -> int:
        """Forward passes of a sample through the attacked model; the student is much smaller."""
        return 2 + len(LOSSES)  # the sample and a random point, then one candidate for each loss

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"student-{self.num_steps}x{self.num_epochs}"

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
        """Return (x_adv (N, ...), fooled (N,) bool); the student is taught on the samples x."""
        model = checked(model, x, y, threat)
        student = teach(model, x, threat, generator, self.num_epochs, batch_size)
        x_adv, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for candidate in self.candidates(student, x, y, threat, generator, batch_size):
            new = (predictions(logits_of(model, candidate, batch_size)) != y) & ~fooled
            x_adv[new], fooled = candidate[new], fooled | new
        return x_adv, fooled

    def candidates(
        self,
        student: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """Return the student's adversarial inputs (N, ...), one tensor for each loss."""
        found = []
        for loss in LOSSES:
            attack = momentum_attack(loss, self.num_steps)
            moved = [
                attack(student, x[rows], y[rows], threat.rows(rows), generator)
                for rows in parts(x, batch_size)
            ]
            found.append(torch.cat(moved))
        return found


def teach(
    model: nn.Module,
    x: Tensor,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    num_epochs: int = 20,
    batch_size: int | None = None,
) -> nn.Module:
    """Return a student (N, ...) -> logits (N, K), taught on the classes that `model` predicts.

    Its samples are the inputs x (N, ...) and one random point in each ball around them, with the model's classes there.
    """
    points = torch.cat([x, threat.random_start(x, generator)])
    logits = logits_of(model, points, batch_size)
    classes = logits.nan_to_num().argmax(1)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=x.device))
    with seeded(x.device, seed), torch.enable_grad():
        student = _network(x.shape[1:], logits.shape[1]).to(x.device)
        optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
        for _ in range(num_epochs):
            for rows in torch.split(torch.randperm(len(points), device=x.device), BATCH):
                optimizer.zero_grad()
                F.cross_entropy(student(points[rows]), classes[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return student.eval()


def _network(shape: torch.Size, num_classes: int) -> nn.Module:
    """Return a small network for images (C, H, W), or for inputs of another shape."""
    if len(shape) != 3:
        size = shape.numel()
        hidden = [nn.Flatten(), nn.Linear(size, 8 * WIDTH), nn.ReLU(), nn.Linear(8 * WIDTH, 8 * WIDTH)]
        return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(8 * WIDTH, num_classes))
    return nn.Sequential(
        nn.Conv2d(shape[0], WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(min(8, (min(shape[1:]) + 1) // 2)),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )
