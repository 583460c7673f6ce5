"""The terms of a training objective: functions of one batch's forward passes to (N,), never reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks.losses import cross_entropy, kl_divergence


class Forwards:
    """One batch and the forward passes over it; each runs when a term first asks for it, and once."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,  # (N, ...) float in [0, 1]
        x_adv: Tensor | None,  # (N, ...) the same where not attacked; None: nothing was attacked
        y: Tensor,  # (N,) int64
    ) -> None:
        self.model, self.x, self.x_adv, self.y = model, x, x_adv, y

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits of the clean inputs, (N, K) float32."""
        logits: Tensor = self.model(self.x).float()
        return logits

    @cached_property
    def adv_logits(self) -> Tensor:
        """Logits of the adversarial inputs, (N, K) float32; the clean ones if nothing was attacked."""
        if self.x_adv is None:
            return self.clean_logits
        logits: Tensor = self.model(self.x_adv).float()
        return logits


def clean_ce(f: Forwards) -> Tensor:
    """-log p_y(x): standard training."""
    return cross_entropy(f.clean_logits, f.y)


def adv_ce(f: Forwards) -> Tensor:
    """-log p_y(x_adv): PGD adversarial training (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""
    return cross_entropy(f.adv_logits, f.y)


def trades_kl(f: Forwards) -> Tensor:
    """KL(p(x) || p(x_adv)): the boundary term of TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 5).

    The gradient flows through both distributions, as in the authors' code. The weight is their beta
    (their 1/lambda); the sum over classes is averaged over the batch.
    """
    return kl_divergence(F.log_softmax(f.clean_logits, dim=1), f.adv_logits)


@dataclass(frozen=True)
class Term:
    """A term's function, and whose logits it looks at."""

    function: Callable[[Forwards], Tensor]
    clean: bool
    adversarial: bool


TERMS: dict[str, Term] = {
    "clean_ce": Term(clean_ce, clean=True, adversarial=False),
    "adv_ce": Term(adv_ce, clean=False, adversarial=True),
    "trades_kl": Term(trades_kl, clean=True, adversarial=True),
}
