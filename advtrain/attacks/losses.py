"""Losses that attacks maximize; each maps a model's outputs to (N,), without reduction.

The gradient is taken of the sum over the batch. A mean would divide each sample's gradient by N, which half precision
rounds to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(logits)_y (N,), the loss of Madry et al. (2018)."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(target_log_probs: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || softmax(logits)) per sample, (N,), with p as log-probabilities (N, K).

    Both sides are in log space, because with p itself as the target the gradient is NaN where p underflows to 0.
    """
    log_probs = F.log_softmax(logits, dim=1)
    return F.kl_div(log_probs, target_log_probs, reduction="none", log_target=True).sum(1)


def symmetric_kl(logits: Tensor, others: Tensor) -> Tensor:
    """Return KL(p || q) + KL(q || p) per sample, (N,).

    p and q are the softmax of `logits` and `others`, (N, K). The value is sum_k (p_k - q_k) (log p_k - log q_k)
    (Jeffreys 1946). No summand is negative, so no summands cancel where p and q are close.
    """
    log_p, log_q = F.log_softmax(logits, dim=1), F.log_softmax(others, dim=1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max_{k != y} z_k - z_y: above 0 where the model is wrong (C&W 2017, f6)."""
    label = logits.gather(1, y.unsqueeze(1))
    others = logits.scatter(1, y.unsqueeze(1), float("-inf"))
    return others.amax(1) - label.squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)).

    Croce & Hein 2020 (arXiv 2003.01690), eq. 6. With two classes there is no third logit. Then the plain margin is
    returned, whose gradient has the same direction.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third).clamp_min(1e-12)


def target_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return z_t - z_y, (N,): 0 on the boundary between label and target."""
    return (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): Croce & Hein 2020, eq. 7.

    With three classes the third logit replaces the mean. With two classes there is no divisor.
    """
    ahead = target_margin(logits, y, target)
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    if top.shape[1] < 3:
        return ahead
    return ahead / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(1e-12)


def residual(outputs: Tensor, y: Tensor) -> Tensor:
    """Return f(x) - y (N,) of `outputs` (N, 1) and `y` (N,) float, in the target's units."""
    return outputs.squeeze(1) - y


@dataclass(frozen=True)
class AttackLoss:
    """Loss to maximize: `function(outputs (N, K), z (N, ...), *context)` -> (N,).

    `context` holds the data of each sample as tensors of N rows, so that the loss can be restricted to some samples.
    """

    function: Callable[..., Tensor]
    context: tuple[Tensor, ...]

    def __call__(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Return the loss per sample at the points `z` with the model's `outputs`."""
        return self.function(outputs, z, *self.context)

    def take(self, rows: Tensor | slice) -> AttackLoss:
        """Return the loss of the samples `rows`: (M,) int64, (N,) bool, or a slice."""
        return AttackLoss(self.function, tuple(tensor[rows] for tensor in self.context))

    def join(self, others: Sequence[AttackLoss]) -> AttackLoss:
        """Return the loss of these samples followed by `others`, which have the same function."""
        contexts = zip(self.context, *(other.context for other in others), strict=True)
        return AttackLoss(self.function, tuple(torch.cat(parts) for parts in contexts))


def build_cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the cross-entropy of the label, as a loss to maximize."""
    return AttackLoss(lambda logits, z, y: cross_entropy(logits, y), (y,))


def build_kl(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss KL(p(x) || p(z)) of TRADES (Zhang et al. 2019); the label is not used.

    p(x) comes from `model`. With a teacher as `model` it is the loss KL(p_t(x) || p(z)) of RSLAD (Zi et al. 2021,
    arXiv 2108.07969).
    """
    with torch.no_grad():
        clean = F.log_softmax(model(x).float(), dim=1)
    return AttackLoss(lambda logits, z, clean: kl_divergence(clean, logits), (clean,))


def build_symmetric_kl(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss KL(p(x) || p(z)) + KL(p(z) || p(x)) of SMART; the label is not used.

    Jiang et al. 2020, arXiv 1911.03437.
    """
    with torch.no_grad():
        clean = model(x).float()
    return AttackLoss(lambda logits, z, clean: symmetric_kl(clean, logits), (clean,))


def build_margin(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the margin loss: logit of the top wrong class minus logit of the label."""
    return AttackLoss(lambda logits, z, y: margin(logits, y), (y,))


def build_dlr(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss `dlr`, the difference of logits ratio."""
    return AttackLoss(lambda logits, z, y: dlr(logits, y), (y,))


def build_targeted_dlr(y: Tensor, target: Tensor) -> AttackLoss:
    """Return the loss `targeted_dlr` for the given target classes."""
    return AttackLoss(lambda logits, z, y, target: targeted_dlr(logits, y, target), (y, target))


def build_target_margin(y: Tensor, target: Tensor) -> AttackLoss:
    """Return the targeted margin loss: logit of the target minus logit of the label."""
    return AttackLoss(lambda logits, z, y, target: target_margin(logits, y, target), (y, target))


def build_linearity(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the local linearity loss of LLR (Qin et al. 2019).

    It is |l(z) - l(x) - (z - x) . grad l(x)| with l the cross-entropy.
    """
    at_x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(model(at_x).float(), y)
    (gradient,) = torch.autograd.grad(loss.sum(), at_x)

    def gap(logits: Tensor, z: Tensor, x: Tensor, y: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        slope = ((z - x) * gradient).flatten(1).sum(1)
        return (cross_entropy(logits, y) - loss - slope).abs()

    return AttackLoss(gap, (x.detach(), y, loss.detach(), gradient))


def build_squared_error(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss (f(z) - y)^2.

    Its gradient is 0 where the prediction is exact, so use a random start.
    """
    return AttackLoss(lambda outputs, z, y: residual(outputs, y).square(), (y,))


def build_absolute_error(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss |f(z) - y|."""
    return AttackLoss(lambda outputs, z, y: residual(outputs, y).abs(), (y,))


def build_over(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss f(z) - y, which maximizes the prediction."""
    return AttackLoss(lambda outputs, z, y: residual(outputs, y), (y,))


def build_under(model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
    """Return the loss y - f(z), which minimizes the prediction."""
    return AttackLoss(lambda outputs, z, y: -residual(outputs, y), (y,))


#: Builders by name: (model, clean x, y) -> AttackLoss. That of kl_teacher takes the teacher as the model.
ATTACK_LOSSES: dict[str, Callable[[Any, Tensor, Tensor], AttackLoss]] = {
    "ce": build_cross_entropy,
    "kl": build_kl,
    "kl_sym": build_symmetric_kl,
    "kl_teacher": build_kl,
    "margin": build_margin,
    "dlr": build_dlr,
    "linearity": build_linearity,
    "mse": build_squared_error,
    "mae": build_absolute_error,
    "over": build_over,
    "under": build_under,
}
