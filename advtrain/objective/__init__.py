"""The objective: a weighted sum of named terms. A published method is a row of weights in a recipe."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from advtrain.lookup import Config, Number
from advtrain.objective.terms import TERMS, Forwards

__all__ = ["TERMS", "Forwards", "Objective", "ObjectiveConfig", "build_objective"]


class ObjectiveConfig(Config):
    """Weights of the terms; 0 leaves a term out. Madry: adv_ce 1. TRADES: clean_ce 1, trades_kl 6."""

    clean_ce: Number = Field(default=0.0, ge=0)
    """weight of the cross-entropy on clean inputs"""
    adv_ce: Number = Field(default=0.0, ge=0)
    """weight of the cross-entropy on adversarial inputs"""
    trades_kl: Number = Field(default=0.0, ge=0)
    """weight of KL(p(x) || p(x_adv)): the beta of TRADES"""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(getattr(self, name) > 0 for name in TERMS):
            raise ValueError(f"every weight is 0; set at least one of {', '.join(TERMS)}")
        return self


class Objective(nn.Module):
    """`sum_i weight_i term_i`, with the model inside, so that DDP sees one forward pass a step.

    However many passes the terms need, the gradients of a step are reduced once, in the backward pass.
    """

    def __init__(self, model: nn.Module, weights: dict[str, float]) -> None:
        super().__init__()
        self.model = model
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def adversarial(self) -> bool:
        """Whether any term needs adversarial inputs."""
        return any(TERMS[name].adversarial for name in self.weights)

    def forward(self, x: Tensor, x_adv: Tensor | None, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss per sample (N,), and sums over the batch, detached: each term, correct answers."""
        forwards = Forwards(self.model, x, x_adv, y)
        terms = {name: TERMS[name].function(forwards) for name in self.weights}
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(0)
        sums = {name: term.detach().sum() for name, term in terms.items()}
        if any(TERMS[name].clean for name in self.weights):
            sums["clean_correct"] = (forwards.clean_logits.detach().argmax(1) == y).sum()
        if self.adversarial:
            sums["adv_correct"] = (forwards.adv_logits.detach().argmax(1) == y).sum()
        return loss, {"loss": loss.detach().sum(), **sums}


def build_objective(config: ObjectiveConfig, model: nn.Module) -> Objective:
    """Build the weighted sum over `model`."""
    return Objective(model, {name: getattr(config, name) for name in TERMS})
