"""Objective of a recipe: the terms, their weights and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, create_model, model_validator

from advtrain.schema import Config, Number


class TermSettings(Config):
    """Settings of single terms; a term with weight 0 must keep its defaults."""

    cw_margin: Number = Field(default=1.0, ge=0)
    """adv_cw: required margin, in logits"""
    label_noise: Literal["uniform", "random", "worst"] = "uniform"
    """label_noise_ce: distribution towards which the label is moved"""
    label_noise_eps: Number = Field(default=0.1, ge=0, le=1)
    """label_noise_ce: amount by which the label is moved"""
    hat_teacher: str | None = None
    """hat: run folder of a standard model on the same data"""
    hat_factor: Number = Field(default=2.0, gt=0)
    """hat: multiple of the adversarial perturbation that makes a helper sample"""
    cure_h: Number = Field(default=1.5, gt=0)
    """cure: length of the finite difference, l2 in input units"""
    huber_delta: Number = Field(default=1.0, gt=0)
    """adv_huber: error above which it is linear, in standard deviations of the training targets"""


@dataclass(frozen=True)
class Term:
    """Term of the objective, defined by one row of TERMS."""

    description: str  # "weight of ..."
    clean: bool = False  # needs the clean outputs
    adversarial: bool = False  # needs the adversarial outputs
    gradient: bool = False  # needs the gradient at the clean input
    regression: bool = False
    distance: bool = False  # 0 with zero gradient where the adversarial input is the clean one
    settings: tuple[str, ...] = ()  # fields of TermSettings that it uses


#: Terms by name, which is also the key of the weight in a recipe's objective, and the name of the function in
#: `objective/terms.py` or, for terms that need the gradient, `objective/regularizers.py`.
TERMS: dict[str, Term] = {
    "clean_ce": Term("the cross-entropy on clean inputs", clean=True),
    "adv_ce": Term("the cross-entropy on adversarial inputs", adversarial=True),
    "trades_kl": Term(
        "KL(p(x) || p(x_adv)) (beta of TRADES)",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "mart_bce": Term("MART's boosted cross-entropy on adversarial inputs", adversarial=True),
    "mart_kl": Term(
        "the misclassification-weighted KL (lambda of MART)",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "alp": Term(
        "the squared distance of clean and adversarial logits",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "adv_cw": Term(
        "the hinge loss on the margin of adversarial inputs",
        adversarial=True,
        settings=("cw_margin",),
    ),
    "label_noise_ce": Term(
        "the cross-entropy on adversarial inputs against perturbed labels",
        adversarial=True,
        settings=("label_noise", "label_noise_eps"),
    ),
    "hat": Term(
        "the cross-entropy on helper samples (gamma of HAT)",
        adversarial=True,
        settings=("hat_teacher", "hat_factor"),
    ),
    "input_gradient": Term("the squared l2 norm of the input gradient", clean=True, gradient=True),
    "cure": Term("the curvature (gamma of CURE)", clean=True, gradient=True, settings=("cure_h",)),
    "llr_gap": Term(
        "the deviation from linearity (lambda of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "llr_slope": Term(
        "the linear change of the loss (mu of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "grad_align": Term("one minus GradAlign's cosine", clean=True, gradient=True),
    "clean_mse": Term(
        "the squared error on clean inputs, in variances of the training targets",
        clean=True,
        regression=True,
    ),
    "clean_mae": Term(
        "the absolute error on clean inputs, in standard deviations of the training targets",
        clean=True,
        regression=True,
    ),
    "adv_mse": Term("the squared error on adversarial inputs", adversarial=True, regression=True),
    "adv_mae": Term("the absolute error on adversarial inputs", adversarial=True, regression=True),
    "adv_huber": Term(
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
