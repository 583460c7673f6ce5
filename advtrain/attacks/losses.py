"""What an attack climbs. Each loss maps logits (N, K) and labels (N,) int64 to (N,), never reduced.

Summed, not averaged, before the gradient is taken: a mean over the batch divides each sample's gradient
by N, which half precision rounds to zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: (logits (N, K), y (N,)) -> loss (N,)
AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(logits)_y (Madry et al. 2018, eq. 2.1)."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(target_log_probs: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || softmax(logits)) per sample, (N,), with p given as log-probabilities (N, K).

    In log space on both sides: with p itself as the target the gradient is NaN where p underflows to 0.
    """
    log_probs = F.log_softmax(logits, dim=1)
    return F.kl_div(log_probs, target_log_probs, reduction="none", log_target=True).sum(1)


def build_cross_entropy(model: nn.Module, x: Tensor) -> AttackLoss:
    """Climb the cross-entropy of the label."""
    return cross_entropy


def build_kl(model: nn.Module, x: Tensor) -> AttackLoss:
    """Climb KL(p(x) || p(z)), as TRADES does (Zhang et al. 2019, eq. 5); the label plays no part."""
    with torch.no_grad():
        clean = F.log_softmax(model(x).float(), dim=1)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return kl_divergence(clean, logits)

    return loss


#: name -> (model, clean x) -> AttackLoss
ATTACK_LOSSES: dict[str, Callable[[nn.Module, Tensor], AttackLoss]] = {
    "ce": build_cross_entropy,
    "kl": build_kl,
}
