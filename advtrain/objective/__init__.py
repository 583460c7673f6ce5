"""Training objective: a weighted sum of named terms, with the weights in the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn

from advtrain.attacks.losses import residual
from advtrain.errors import UserError
from advtrain.models.network import embed, embeds, from_perturbed, threat_at
from advtrain.objective import regularizers, terms
from advtrain.objective.forward_cache import ForwardCache, TermSettings
from advtrain.schema import Config, Number, load_attribute
from advtrain.threat import ThreatModel

__all__ = ["TERMS", "ForwardCache", "ObjectiveModule", "ObjectiveConfig", "Term", "TermSettings"]


@dataclass(frozen=True)
class Term:
    """Term of the objective, defined by one row of TERMS."""

    function: Callable[[ForwardCache], Tensor]  # -> (N,)
    description: str = ""  # "weight of ..."
    clean: bool = False  # needs the clean outputs
    adversarial: bool = False  # needs the adversarial outputs
    gradient: bool = False  # needs the gradient at the clean input
    regression: bool = False
    distance: bool = False  # 0 with zero gradient where the adversarial input is the clean one
    settings: tuple[str, ...] = ()  # fields of TermSettings that it uses


#: Terms by name, which is also the key of the weight in a recipe's objective.
TERMS: dict[str, Term] = {
    "clean_ce": Term(terms.clean_ce, "the cross-entropy on clean inputs", clean=True),
    "adv_ce": Term(terms.adv_ce, "the cross-entropy on adversarial inputs", adversarial=True),
    "trades_kl": Term(
        terms.trades_kl,
        "KL(p(x) || p(x_adv)) (beta of TRADES)",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "mart_bce": Term(terms.mart_bce, "MART's boosted cross-entropy on adversarial inputs", adversarial=True),
    "mart_kl": Term(
        terms.mart_kl,
        "the misclassification-weighted KL (lambda of MART)",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "alp": Term(
        terms.alp,
        "the squared distance of clean and adversarial logits",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "adv_cw": Term(
        terms.adv_cw,
        "the hinge loss on the margin of adversarial inputs",
        adversarial=True,
        settings=("cw_margin",),
    ),
    "label_noise_ce": Term(
        terms.label_noise_ce,
        "the cross-entropy on adversarial inputs against perturbed labels",
        adversarial=True,
        settings=("label_noise", "label_noise_eps"),
    ),
    "hat": Term(
        terms.hat,
        "the cross-entropy on helper samples (gamma of HAT)",
        adversarial=True,
        settings=("hat_teacher", "hat_factor"),
    ),
    "input_gradient": Term(
        regularizers.input_gradient, "the squared l2 norm of the input gradient", clean=True, gradient=True
    ),
    "cure": Term(
        regularizers.cure, "the curvature (gamma of CURE)", clean=True, gradient=True, settings=("cure_h",)
    ),
    "llr_gap": Term(
        regularizers.llr_gap,
        "the deviation from linearity (lambda of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "llr_slope": Term(
        regularizers.llr_slope,
        "the linear change of the loss (mu of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "grad_align": Term(regularizers.grad_align, "one minus GradAlign's cosine", clean=True, gradient=True),
    "clean_mse": Term(
        terms.clean_mse,
        "the squared error on clean inputs, in variances of the training targets",
        clean=True,
        regression=True,
    ),
    "clean_mae": Term(
        terms.clean_mae,
        "the absolute error on clean inputs, in standard deviations of the training targets",
        clean=True,
        regression=True,
    ),
    "adv_mse": Term(
        terms.adv_mse, "the squared error on adversarial inputs", adversarial=True, regression=True
    ),
    "adv_mae": Term(
        terms.adv_mae, "the absolute error on adversarial inputs", adversarial=True, regression=True
    ),
    "adv_huber": Term(
        terms.adv_huber,
        "Huber's loss on adversarial inputs",
        adversarial=True,
        regression=True,
        settings=("huber_delta",),
    ),
}


class CustomTermConfig(Config):
    """Custom term."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function that maps advtrain.objective.ForwardCache to (N,)"""
    weight: Number = Field(default=1.0, ge=0)
    """weight of the custom term"""


_Weights: Any = create_model(  # type: ignore[call-overload]
    "TermWeights",
    __base__=TermSettings,
    **{
        name: (
            Number,
            Field(
                default=0.0,
                ge=0,
                description=f"{'regression: ' if term.regression else ''}weight of {term.description}",
            ),
        )
        for name, term in TERMS.items()
    },
)


class ObjectiveConfig(_Weights):
    """Weights of the terms, at least 0; 0 leaves a term out.

    Madry: adv_ce 1. TRADES: clean_ce 1, trades_kl 6.
    """

    renamed = {"own": "custom"}
    custom: CustomTermConfig | None = None
    """custom term"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        used = self.used
        if not used and not self.uses_custom:
            raise ValueError(f"every weight is 0; set at least one of {', '.join(TERMS)}")
        if len({term.regression for term in used.values()}) > 1:
            raise ValueError(f"{', '.join(used)} mix terms of a regression with those of a classification")
        for name, term in TERMS.items():
            for field in term.settings if name not in used else ():
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(f"{field} belongs to {name}, which has weight 0")
        if "hat" in used and self.hat_teacher is None:
            raise ValueError("hat needs hat_teacher: the run folder of a standard model on the same data")
        return self

    @property
    def used(self) -> dict[str, Term]:
        """Built-in terms with a weight above 0."""
        return {name: term for name, term in TERMS.items() if getattr(self, name) > 0}

    @property
    def uses_custom(self) -> bool:
        """True if the custom term has a weight above 0."""
        return self.custom is not None and self.custom.weight > 0

    @property
    def formula(self) -> str:
        """Sum of the used terms with their weights, as `clean_ce + 6 trades_kl`."""
        weights = {name: getattr(self, name) for name in self.used}
        if self.custom is not None and self.uses_custom:
            weights[self.custom.function] = self.custom.weight
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())

    @property
    def adversarial(self) -> bool:
        """True if any term needs adversarial inputs."""
        return self.uses_custom or any(term.adversarial for term in self.used.values())

    @property
    def regression(self) -> bool | None:
        """True if the terms are for a regression; None if only the custom term is used."""
        return next((term.regression for term in self.used.values()), None)


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
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.target_scale = model, config, target_scale
        if teacher is not None and embeds(model):
            raise UserError("hat runs a teacher on perturbed inputs; this model perturbs embed(x)")
        self.teacher = (teacher,)  # a tuple keeps it out of the trained modules
        self.adversarial = config.adversarial  # computed once, because every step reads it
        self.terms = config.used
        self.weights: dict[str, float] = {name: getattr(config, name) for name in self.terms}
        if config.custom is not None and config.uses_custom:
            self.weights["custom"] = config.custom.weight
            function = load_attribute(config.custom.function, "objective.custom.function")
            self.terms["custom"] = Term(function, "custom", adversarial=True, gradient=True)

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
            z_adv: (N, ...), adversarial version of embed(x), which is x for most models; None: no attack.
            y: (N,) int64 labels, or float32 targets.
            threat: training threat model of the recipe.
            generator: source of the terms' random draws.
            dropout_seed: see ForwardCache.
        """
        z = embed(self.model, x)
        f = ForwardCache(
            from_perturbed(self.model),
            z,
            z_adv,
            y,
            options=self.config,
            threat=None if threat is None else threat_at(self.model, z.detach(), threat),
            generator=generator,
            teacher=self.teacher[0],
            dropout_seed=dropout_seed,
            scale=self.target_scale[1] if self.target_scale else 1.0,
            gradient=any(term.gradient for term in self.terms.values()),
        )
        values = {name: self._value(name, term, f) for name, term in self.terms.items()}
        first, *others = (self.weights[name] * value for name, value in values.items())
        loss = sum(others, first)
        sums = {name: value.detach().sum() for name, value in values.items()}
        if any(term.clean for term in self.terms.values()):
            sums |= self._figure("clean", f.clean_logits.detach(), y)
        if self.adversarial:
            sums |= self._figure("adv", f.adv_logits.detach(), y)
        return loss, {"loss": loss.detach().sum(), **sums}

    def _value(self, name: str, term: Term, f: ForwardCache) -> Tensor:
        value = term.function(f)
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
