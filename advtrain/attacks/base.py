"""The attack contract: a function of (model, x, y, threat, generator) that leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advtrain.attacks.losses import AttackLoss
from advtrain.errors import UserError
from advtrain.threat import ThreatModel, alongside

BatchNormMode = Literal["eval", "train"]


class Attack(Protocol):
    """Maps clean inputs to adversarial ones inside the threat model.

    Its "inputs" are what is perturbed: of a network that embeds them embed(x) (`models/network.py`).
    """

    def __call__(
        self,
        model: nn.Module,  # (N, ...) -> logits (N, K); any module, DDP's inner one when distributed
        x: Tensor,  # (N, ...) float in [threat.low, threat.high]
        y: Tensor,  # (N,) int64, or float32 targets of a regression
        threat: ThreatModel,
        generator: torch.Generator | None = None,  # on x's device; the only source of randomness
    ) -> Tensor:  # (N, ...) float, detached, inside the threat model
        """Return the adversarial inputs."""
        ...

    def scaled(self, factor: float) -> Attack:
        """Return the attack with `factor` times its step size, for a warm-up that scales the radius by as much."""
        ...


class FailureSearch(Protocol):
    """An attack in an evaluation: in each of its rounds it searches for inputs that fool the model."""

    @property
    def name(self) -> str:
        """As the report shows it."""
        ...

    @property
    def num_rounds(self) -> int:
        """Starts or targets, each over the samples that are still robust."""
        ...

    @property
    def num_draws(self) -> int:
        """Passes that each step averages over; more than 1 for models whose outputs are random."""
        ...

    def check(self, threat: ThreatModel) -> None:
        """Raise a UserError if the attack does not search this threat model's balls."""
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
        """Round `number`: return (x_adv (N, ...), fooled (N,) bool).

        The model sees at most `batch_size` samples at a time (None: all of them).
        """
        ...


class SearchDefaults:
    """The defaults of a FailureSearch: one pass a step, balls of every norm."""

    num_draws: int = 1

    def check(self, threat: ThreatModel) -> None:
        """Take every threat model."""


def check_covers_input(name: str, threat: ThreatModel) -> None:
    """Refuse, with a UserError, a threat model that is no ball around the whole input in a finite box."""
    if not threat.covers_input:
        raise UserError(
            f"{name} searches balls around whole inputs in a finite box; leave it out of the suite (pgd, apgd-ce, "
            "apgd-dlr and apgd-t also search where some positions are fixed, embeddings, and balls around tokens)"
        )


@contextmanager
def frozen_bn_stats(model: nn.Module) -> Iterator[None]:
    """Let batch norm in training mode use its batch's statistics without updating its running ones."""
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
    """Put the model into the state in which it is attacked, and back exactly as it was, also on an error.

    Inside: evaluation mode (no dropout, so no draw from the global generator) and parameters that ask for
    no gradient. `batch_norm="train"` normalises with the statistics of the attacked batch, as some published
    code does; the running statistics are neither used nor updated.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m, _ in modes if isinstance(m, _BatchNorm)]
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
    """Return the predicted classes (N,) int64; -1, which is no label, where a logit is NaN or infinite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def within(found: Tensor, distance: Tensor, x: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Return (x_adv (N, ...), fooled (N,) bool): of the points `found` at `distance` (N,) those inside the radius."""
    fooled = distance <= threat.per_sample(threat.eps, distance)
    return torch.where(alongside(fooled, x), found, x), fooled


def top_wrong_class(logits: Tensor, y: Tensor, number: int) -> Tensor | None:
    """Return the wrong class of rank `number` by logit, (N,) int64; None if there are not as many."""
    if number >= logits.shape[1] - 1:
        return None
    wrong = logits.scatter(1, y.unsqueeze(1), float("-inf"))
    return wrong.argsort(dim=1, descending=True)[:, number]


def input_gradient(
    model: nn.Module,
    z: Tensor,  # (N, ...) float
    loss: AttackLoss,
) -> tuple[Tensor, Tensor]:  # gradient (N, ...), outputs (N, K) float32, both detached
    """Return d loss_i / d z_i of each sample, and the outputs at `z`; no parameter's `.grad` is touched.

    `torch.autograd.grad` with respect to the input alone: no DDP hook fires and no weight gradient is computed.
    The gradient is 0 where the outputs do not depend on the input through differentiable operations.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        outputs = model(z).float()
        total = loss(outputs, z).sum()
    if not total.requires_grad:
        return torch.zeros_like(z), outputs.detach()
    (gradient,) = torch.autograd.grad(total, z, allow_unused=True, materialize_grads=True)
    return gradient, outputs.detach()
