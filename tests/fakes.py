"""Models that hide or fake robustness: each wraps a network, and keeps its accuracy on clean images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks import GradientAttack
from advtrain.recipe.attack import AttackConfig
from advtrain.threat import ThreatModel


class Fake(nn.Module):
    """The network without masking, wrapped by a masking layer in subclasses.

    Args:
        net: the network.
        x, y: the evaluated images (N, ...) and labels (N,).
        eps: linf radius of the evaluation.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
        super().__init__()
        self.net, self.eps = net, eps
        self.x, self.y = x, y

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linf distance to the nearest evaluated image, and its label."""
        distance = torch.cdist(x.flatten(1), self.x.flatten(1), p=float("inf"))
        size, index = distance.min(1)
        return size, self.y[index]


def smooth(x: Tensor) -> Tensor:
    """Return a smooth function (N, 10) of the pixels that says nothing about the class."""
    weight = torch.sin(torch.arange(10 * x[0].numel(), dtype=x.dtype)).view(10, -1)
    return 0.01 * torch.tanh(x.flatten(1) @ weight.T)


class Scaled(Fake):
    def forward(self, x):
        return 10_000 * self.net(x)


class Saturated(Fake):
    """Sigmoids that saturate to 0 or 1 in float32; a small linear term keeps the order."""

    def forward(self, x):
        z = self.net(x)
        return torch.sigmoid(50 * (z - z.amax(1, keepdim=True).detach() + 0.5)) + 1e-4 * z.detach()


class Quantised(Fake):
    def forward(self, x):
        return self.net((4 * x).round() / 4)


class StraightThrough(Fake):
    """Inputs quantized to five levels, with a straight-through gradient."""

    def forward(self, x):
        return self.net(x + ((4 * x).round() / 4 - x).detach())


class Argmax(Fake):
    def forward(self, x):
        return F.one_hot(self.net(x).argmax(1), 10).float()


class Dropout(Fake):
    def forward(self, x):
        return self.net(F.dropout(x, 0.3, training=True))


class BatchNorm(Fake):
    def forward(self, x):
        return self.net(0.9 * x + 0.1 * F.batch_norm(x, None, None, training=True))


class Noisy(Fake):
    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


class Memory(Fake):
    """An input near an earlier one gets that one's scores; up to 64 pixels are compared."""

    def __init__(self, *about):
        super().__init__(*about)
        self.known, self.scores, self.limit = [], [], 20 * len(self.x)

    def store(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.known, self.scores

    def forward(self, x):
        known, scores = self.store()
        now, out = x.detach(), self.net(x).detach()
        every = max(1, now[0].numel() // 64)
        seen = now.flatten(1)[:, ::every]
        if known:
            distance = torch.cdist(seen, torch.cat(known), p=float("inf"))
            size, index = distance.min(1)
            near = size <= self.eps * 1.01
            out = torch.where(near[:, None], torch.cat(scores)[index], out)
        else:
            near = torch.zeros(len(x), dtype=torch.bool)
        if not near.all() and sum(map(len, known)) < self.limit:
            known.append(seen[~near].clone())
            scores.append(out[~near].clone())
        return out + smooth(x)


class FirstQueries(Memory):
    """A memory that the first queries fill."""

    def __init__(self, *about):
        super().__init__(*about)
        self.limit = len(self.x)


REMEMBERED: tuple[list[Tensor], list[Tensor]] = ([], [])


class SharedMemory(Memory):
    """A memory outside the module, which a copy shares."""

    def store(self):
        return REMEMBERED


class DecisionAlone(Fake):
    """Scores say only the predicted class, plus a smooth function that says nothing."""

    def forward(self, x):
        return F.one_hot(self.net(x).argmax(1), 10).float() + smooth(x)


class SteepDecision(Fake):
    """Scores that meet at the boundary, but are flat a short way from it."""

    def forward(self, x):
        return F.softmax(10_000 * self.net(x).detach(), 1) + smooth(x)


class TestSetInside(Fake):
    """The nearest evaluated image within the radius gives its label."""

    def forward(self, x):
        size, label = self.nearest(x.detach())
        bonus = 100 * F.one_hot(label, 10) * (size <= 1.01 * self.eps)[:, None]
        return self.net(x) + bonus


class RandomGradient(Fake):
    """A made-up gradient, and a little noise."""

    def forward(self, x):
        made_up = 100 * smooth(x)
        return self.net(x).detach() + made_up - made_up.detach() + 0.05 * torch.randn(len(x), 10)


class OffTheGrid(TestSetInside):
    """Knows the test set, but only off the grid of 8-bit images."""

    def forward(self, x):
        off = ((255 * x - (255 * x).round()).abs() > 1e-3).flatten(1).any(1)
        return torch.where(off[:, None], super().forward(x), self.net(x))


class GradientAware(TestSetInside):
    """Knows the test set, but only while gradients are recorded."""

    def forward(self, x):
        return super().forward(x) if x.requires_grad else self.net(x) + smooth(x)


class LargeChanges(TestSetInside):
    """Knows the test set, but only for changes of the size that attacks make."""

    def forward(self, x):
        size, _ = self.nearest(x.detach())
        return torch.where((size > 0.8 * self.eps)[:, None], super().forward(x), self.net(x))


class WholeImage(TestSetInside):
    """Knows the test set, but only where both halves of the image are changed."""

    def forward(self, x):
        near = self.x[torch.cdist(x.detach().flatten(1), self.x.flatten(1), p=float("inf")).argmin(1)]
        change = (x.detach() - near).abs()
        both = (change[..., : x.shape[-1] // 2].amax((1, 2, 3)) > 0.02) & (
            change[..., x.shape[-1] // 2 :].amax((1, 2, 3)) > 0.02
        )
        return torch.where(both[:, None], super().forward(x), self.net(x))


class InBatches(TestSetInside):
    """Knows the test set, but only beside its images, and if it is asked for several."""

    def forward(self, x):
        size, _ = self.nearest(x.detach())
        beside = (size > 0.1 * self.eps) & (len(x) > 1)
        return torch.where(beside[:, None], super().forward(x), self.net(x))


class AskedAgain(TestSetInside):
    """Knows the test set where the same inputs are asked twice in a row, as for a mean over draws."""

    def forward(self, x):
        again = getattr(self, "last", None) is not None and torch.equal(self.last, x)
        self.last = x.detach().clone()
        return (super().forward(x) if again else self.net(x)) + 0.1 * torch.randn(len(x), 10)


class Purifier(Fake):
    """Moves its input against the loss of its own prediction before it classifies it."""

    def forward(self, x):
        config = AttackConfig.model_validate({"num_steps": 5, "target": "least_likely", "start": "none"})
        now = x.detach()
        moved = GradientAttack(config)(
            self.net, now, self.net(now).argmax(1), ThreatModel("linf", self.eps / 2)
        )
        return self.net(x + (2 * now - moved - x).detach())


#: All fakes by name.
KINDS = {
    kind.__name__: kind
    for kind in (
        Scaled,
        Saturated,
        Quantised,
        StraightThrough,
        Argmax,
        Dropout,
        BatchNorm,
        Noisy,
        Memory,
        FirstQueries,
        SharedMemory,
        DecisionAlone,
        SteepDecision,
        TestSetInside,
        RandomGradient,
        OffTheGrid,
        GradientAware,
        LargeChanges,
        WholeImage,
        InBatches,
        AskedAgain,
        Purifier,
    )
}
