"""Attack interfaces: functions of (model, x, y, threat, generator) that restore the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advtrain.attacks.losses import AttackLoss
from advtrain.errors import UserError
from advtrain.recipe.attack import BatchNormMode
from advtrain.threat import ThreatModel, alongside


class Attack(Protocol):
    """Function that maps clean inputs to adversarial inputs inside the threat model.

    Inputs are the perturbed tensor. For a network with an embedding this is embed(x) (`models/network.py`).
    """

    def __call__(
        self,
        model: nn.Module,  # (N, ...) -> logits (N, K); any module, without its DDP wrapper
        x: Tensor,  # (N, ...) float in [threat.low, threat.high]
        y: Tensor,  # (N,) int64, or float32 targets of a regression
        threat: ThreatModel,
        generator: torch.Generator | None = None,  # on x's device; the only source of randomness
    ) -> Tensor:  # (N, ...) float, detached, inside the threat model
        """Return the adversarial inputs."""
        ...

    def scaled(self, factor: float) -> Attack:
        """Return the attack with `factor` times its step size, for warm-ups that scale the radius."""
        ...


class FailureSearch(Protocol):
    """Evaluation attack, which searches in one or more rounds for inputs that fool the model."""

    @property
    def name(self) -> str:
        """Name in the report."""
        ...

    @property
    def num_rounds(self) -> int:
        """Number of restarts or targets, each run on the samples that are still robust."""
        ...

    @property
    def num_draws(self) -> int:
        """Number of passes averaged in each step; more than 1 for stochastic models."""
        ...

    @property
    def cost(self) -> int:
        """Forward passes of a sample in a round, for the time left; a backward pass counts as two."""
        ...

    def check(self, threat: ThreatModel) -> None:
        """Raise a UserError if the attack does not support the threat model."""
        ...

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,  # (N, ...) float in [threat.low, threat.high]
        y: Tensor,  # (N,) int64
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run round `number` and return (x_adv (N, ...), fooled (N,) bool).

        A pass takes at most `batch_size` samples (None: all).
        """
        ...


class SearchDefaults:
    """Defaults of a FailureSearch: gradient steps of one pass, support of every threat model."""

    num_steps: int = 100
    num_draws: int = 1

    @property
    def cost(self) -> int:
        """Forward passes of a sample in a round, for the time left; a backward pass counts as two."""
        return 3 * self.num_steps * self.num_draws

    def check(self, threat: ThreatModel) -> None:
        """Accept every threat model."""


class InputSearch(SearchDefaults):
    """Defaults of a FailureSearch that needs B(x) to be one ball around the whole input."""

    kind: str  # name without the budget

    def check(self, threat: ThreatModel) -> None:
        """Raise a UserError unless B(x) is one ball around the whole input in a finite box."""
        check_covers_input(self.kind, threat)


def check_covers_input(name: str, threat: ThreatModel) -> None:
    """Raise a UserError unless B(x) is one ball around the whole input in a finite box."""
    if not threat.covers_input:
        raise UserError(
            f"{name} searches balls around whole inputs in a finite box; leave it out of the suite (pgd, apgd-ce, "
            "apgd-dlr and apgd-t also support fixed positions, embeddings, and balls around tokens)"
        )


@contextmanager
def frozen_bn_stats(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm fixed while it is in training mode."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def attack_mode(model: nn.Module, batch_norm: BatchNormMode = "eval") -> Iterator[None]:
    """Put the model into the mode for attacks, and restore its state afterwards.

    The state is also restored on an error. Inside, the model is in evaluation mode (no dropout, so no draw from the
    global generator) and its parameters require no gradient. `batch_norm="train"` normalizes with the statistics of the
    attacked batch, as some published code does; the running statistics are neither used nor updated. Batch norm that is
    frozen, in evaluation mode within a model in training mode, keeps its running statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m, training in modes if isinstance(m, _BatchNorm) and (training or not model.training)]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training = batch_norm == "train"
        for parameter in trained:
            parameter.requires_grad_(False)
        with frozen_bn_stats(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def predictions(logits: Tensor) -> Tensor:
    """Return the predicted classes (N,) int64, and -1 (no class) where a logit is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def logits_of(model: nn.Module, x: Tensor, batch_size: int | None = None) -> Tensor:
    """Return the logits (N, K) float32 at x (N, ...), with at most `batch_size` samples a pass."""
    with attack_mode(model), torch.no_grad():
        return torch.cat([model(part).float() for part in torch.split(x, batch_size or max(1, len(x)))])


def within(found: Tensor, distance: Tensor, x: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Return (x_adv (N, ...), fooled (N,) bool) for adversarial examples of minimal size.

    A sample is fooled if the `distance` (N,) of its point `found` is within the radius. Other rows of x_adv are x.
    """
    fooled = distance <= threat.per_sample(threat.eps, distance)
    return torch.where(alongside(fooled, x), found, x), fooled


def top_wrong_class(logits: Tensor, y: Tensor, number: int) -> Tensor | None:
    """Return the wrong class of rank `number` by logit, (N,) int64; None if there are fewer."""
    if number >= logits.shape[1] - 1:
        return None
    wrong = logits.scatter(1, y.unsqueeze(1), float("-inf"))
    return wrong.argsort(dim=1, descending=True)[:, number]


def input_gradient(
    model: nn.Module,
    z: Tensor,  # (N, ...) float
    loss: AttackLoss,
) -> tuple[Tensor, Tensor]:  # gradient (N, ...), outputs (N, K) float32, both detached
    """Return d loss_i / d z_i of each sample, and the outputs at `z`.

    `torch.autograd.grad` differentiates with respect to the input only. No DDP hook runs, no weight gradient is
    computed, and no parameter's `.grad` changes. The gradient is 0 where the outputs do not depend on the input
    through differentiable operations.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        outputs = model(z).float()
        total = loss(outputs, z).sum()
    if not total.requires_grad:
        return torch.zeros_like(z), outputs.detach()
    (gradient,) = torch.autograd.grad(total, z, allow_unused=True, materialize_grads=True)
    return gradient, outputs.detach()
