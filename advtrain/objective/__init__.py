"""Training objective: a weighted sum of named terms, with the weights in the recipe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advtrain.attacks.losses import residual
from advtrain.errors import UserError
from advtrain.models.network import adversarial_point, embed, embeds, from_perturbed, threat_at
from advtrain.objective import regularizers, terms
from advtrain.objective.forward_cache import ForwardCache
from advtrain.objective.references import Anchor, Teacher
from advtrain.recipe.objective import TERMS, ObjectiveConfig, Term, TermSettings
from advtrain.schema import load_attribute
from advtrain.threat import ThreatModel

__all__ = [
    "FUNCTIONS",
    "TERMS",
    "Anchor",
    "ForwardCache",
    "ObjectiveModule",
    "ObjectiveConfig",
    "Teacher",
    "Term",
    "TermSettings",
]


#: Function of each term: ForwardCache -> (N,). It has the name of the term.
FUNCTIONS: dict[str, Callable[[ForwardCache], Tensor]] = {
    name: getattr(regularizers if term.gradient else terms, name) for name, term in TERMS.items()
}


class ObjectiveModule(nn.Module):
    """Loss `sum_i weight_i term_i` with the model inside, so that DDP sees one forward per step.

    The gradients of a step are reduced once, in the backward pass, for any number of passes.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        model: nn.Module,
        *,
        target_scale: tuple[float, float] | None = None,
        teacher: Teacher | None = None,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.target_scale = model, config, target_scale
        self.teacher, self.anchor = teacher, anchor
        self.adversarial = config.adversarial  # computed once, because every step reads it
        self.terms = config.used
        self._check_references()
        self.functions = {name: FUNCTIONS[name] for name in self.terms}
        self.weights: dict[str, float] = {name: getattr(config, name) for name in self.terms}
        if config.custom is not None and config.uses_custom:
            self.weights["custom"] = config.custom.weight
            self.functions["custom"] = load_attribute(config.custom.function, "objective.custom.function")
            self.terms["custom"] = Term("custom", adversarial=True, gradient=True)

    def _check_references(self) -> None:
        if "hat" in self.terms and embeds(self.model):
            raise UserError("hat runs a teacher on perturbed inputs; this model perturbs embed(x)")
        if self.config.taught and self.teacher is None:
            raise UserError(f"{', '.join(self.config.taught)}: there is no teacher")
        if any(term.anchor for term in self.terms.values()) and self.anchor is None:
            raise UserError("objective.l2_sp needs start weights: set model.from")

    def forward(
        self,
        x: Tensor,
        z_adv: Tensor | None,
        y: Tensor,
        threat: ThreatModel | None = None,
        generator: torch.Generator | None = None,
        dropout_seed: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss per sample (N,), and detached sums over the batch.

        The sums are those of each term and of correct predictions (for a regression: of absolute errors).

        Args:
            x: (N, ...), inputs of the batch.
            z_adv: (N, ...), adversarial version of embed(x), which is x for most models; or the token ids (N, L') of
                edited texts; None: no attack.
            y: (N,) int64 labels, or float32 targets.
            threat: training threat model of the recipe.
            generator: source of the terms' random draws.
            dropout_seed: see ForwardCache.
        """
        z = embed(self.model, x)
        f = ForwardCache(
            from_perturbed(self.model),
            z,
            None if z_adv is None else adversarial_point(self.model, z_adv),
            y,
            options=self.config,
            threat=None if threat is None else threat_at(self.model, z.detach(), threat),
            generator=generator,
            teacher=self.teacher,
            anchor=self.anchor,
            x=x,
            dropout_seed=dropout_seed,
            scale=self.target_scale[1] if self.target_scale else 1.0,
            edited=z_adv is not None and not z_adv.is_floating_point(),
            gradient=any(term.gradient for term in self.terms.values()),
            features=any(term.features for term in self.terms.values()),
        )
        values = {name: self._value(name, f) for name in self.terms}
        first, *others = (self.weights[name] * value for name, value in values.items())
        loss = sum(others, first)
        sums = {name: value.detach().sum() for name, value in values.items()}
        if any(term.clean for term in self.terms.values()):
            sums |= self._figure("clean", f.clean_logits.detach(), y)
        if self.adversarial:
            sums |= self._figure("adv", f.adv_logits.detach(), y)
        return loss, {"loss": loss.detach().sum(), **sums}

    def _value(self, name: str, f: ForwardCache) -> Tensor:
        value = self.functions[name](f)
        if name == "custom" and (not isinstance(value, Tensor) or value.shape != f.y.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"objective.custom.function gave {shape}, not a tensor ({len(f.y)},): one value for each sample"
            )
        return value

    def _figure(self, kind: str, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.target_scale is not None:
            return {f"{kind}_abs_error": residual(outputs, y).abs().sum()}
        return {f"{kind}_correct": (outputs.argmax(1) == y).sum()}
