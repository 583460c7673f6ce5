"""Loss function for custom training loops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from advtrain.api.checks import build_teacher, parse_threat, unwrap, validate
from advtrain.api.texts import Texts, to_tensor
from advtrain.attacks import check_labels
from advtrain.errors import UserError
from advtrain.objective import TERMS, ObjectiveConfig, ObjectiveModule
from advtrain.threat import ThreatModel


class Objective:
    """Loss for a training loop, with the same terms as a recipe.

    Example: `loss = Objective(clean_ce=1, trades_kl=6)(model, x, x_adv, y)`.

    Args:
        teacher: module that maps x to logits (N, K), for hat, distill_adv, distill_clean, feature_match and custom. It
            runs in evaluation mode and is not trained. Its weights must not change, because its outputs for the last
            batch are reused.
        **weights: weights of the terms, and their settings (`advtrain.objective.TERMS`). Madry: adv_ce=1. TRADES:
            clean_ce=1, trades_kl=6. MART: mart_bce=1, mart_kl=5.

    Raises:
        UserError: unknown term, no weight above 0, or incompatible settings.
    """

    def __init__(self, *, teacher: nn.Module | None = None, **weights: Any) -> None:
        self.teacher = build_teacher(teacher)
        taught = [name for name, term in TERMS.items() if term.teacher and weights.get(name)]
        if taught and teacher is None:
            raise UserError(f"{', '.join(taught)}: pass teacher, a module")
        named = {} if teacher is None else {"teacher": "the given module"}
        self.config = validate(ObjectiveConfig, weights | named)
        if "l2_sp" in self.config.used:
            raise UserError("l2_sp needs the start weights of a run; use `advtrain train`")
        if teacher is not None and not taught and not self.config.uses_custom:
            raise UserError("teacher has no effect: no term with a weight above 0 needs one")

    def __call__(
        self,
        model: nn.Module,
        x: Tensor | Texts,
        x_adv: Tensor | None,
        y: Tensor,
        threat: ThreatModel | str | None = None,
    ) -> Tensor:
        """Return the mean loss over the batch, 0-dim.

        A forward pass that several terms need runs once.

        Args:
            model: maps x to logits (N, K), in training mode.
            x: (N, ...) float32; inputs of any type for an EmbeddingModel; texts for a text model.
            x_adv: (N, ...) adversarial inputs from `Adversary`; None: no attack.
            y: (N,) int64 labels, or float targets of a regression.
            threat: threat model, for terms that evaluate points around x (grad_align).
        """
        return self.per_sample(model, x, x_adv, y, threat)[0].mean()

    def per_sample(
        self,
        model: nn.Module,
        x: Tensor | Texts,
        x_adv: Tensor | None,
        y: Tensor,
        threat: ThreatModel | str | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (N,), and batch sums of the terms and correct predictions."""
        regression = self.config.regression is True
        scale = (0.0, 1.0) if regression else None
        module = ObjectiveModule(self.config, model, target_scale=scale, teacher=self.teacher)
        if threat is None and "grad_align" in self.config.used:
            raise UserError("grad_align needs a threat model: pass threat, for example threat='linf:8/255'")
        x = to_tensor(unwrap(model), x)
        check_labels(y, len(x))
        ball = None if threat is None else parse_threat(threat)
        loss, sums = module(x, x_adv, y, ball)
        return loss, dict(sums)
