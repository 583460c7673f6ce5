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
    teacher: str | None = None
    """hat, distill_adv, distill_clean, feature_match, adversary.loss kl_teacher: model that teaches, a reference like
    model.from (hat: a standard model on the same data; a file: weights of the recipe's own network)"""
    teacher_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the teacher's weights; a new run fills it in, and other weights are refused"""
    distill_temperature: Number = Field(default=1.0, gt=0)
    """distill_adv, distill_clean: temperature that divides the logits of teacher and student (ARD: 30)"""
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
    teacher: bool = False  # needs objective.teacher
    anchor: bool = False  # needs the start weights
    features: bool = False  # needs the input of the last layer
    regression: bool | None = False  # None: for both tasks
    ball: bool = False  # uses other points of the ball, or x_adv - x
    distance: bool = False  # 0 with zero gradient where the adversarial input is the clean one
    settings: tuple[str, ...] = ()  # fields of TermSettings that it uses


#: What objective.teacher may name, for messages.
TEACHERS = "models:/NAME@ALIAS, a run, or a file of weights"

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
    "kl_sym": Term(
        "KL(p(x) || p(x_adv)) + KL(p(x_adv) || p(x)) (SMART, R3F)",
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
        teacher=True,
        ball=True,
        settings=("hat_factor",),
    ),
    "distill_adv": Term(
        "t^2 KL(teacher(x) || p(x_adv)) at temperature t (ARD, RSLAD)",
        adversarial=True,
        teacher=True,
        settings=("distill_temperature",),
    ),
    "distill_clean": Term(
        "t^2 KL(teacher(x) || p(x)) at temperature t (LwF)",
        clean=True,
        teacher=True,
        settings=("distill_temperature",),
    ),
    "feature_match": Term(
        "the squared distance of the features of x_adv to the teacher's features of x (FARE)",
        adversarial=True,
        teacher=True,
        features=True,
        regression=None,
    ),
    "l2_sp": Term(
        "half the squared distance of the weights below the last layer to the start weights (alpha of L2-SP)",
        anchor=True,
        regression=None,
    ),
    "input_gradient": Term("the squared l2 norm of the input gradient", clean=True, gradient=True),
    "cure": Term("the curvature (gamma of CURE)", clean=True, gradient=True, settings=("cure_h",)),
    "llr_gap": Term(
        "the deviation from linearity (lambda of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        ball=True,
        distance=True,
    ),
    "llr_slope": Term(
        "the linear change of the loss (mu of LLR)",
        clean=True,
        adversarial=True,
        gradient=True,
        ball=True,
        distance=True,
    ),
    "grad_align": Term("one minus GradAlign's cosine", clean=True, gradient=True, ball=True),
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

    renamed = {"own": "custom", "hat_teacher": "teacher"}
    custom: CustomTermConfig | None = None
    """custom term"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        used = self.used
        if not used and not self.uses_custom:
            raise ValueError(f"every weight is 0; set at least one of {', '.join(TERMS)}")
        if not self.uses_custom and all(term.anchor for term in used.values()):
            raise ValueError("l2_sp only keeps the weights near the start weights; add another term")
        if len({term.regression for term in used.values()} - {None}) > 1:
            raise ValueError(f"{', '.join(used)} mix terms of a regression with those of a classification")
        settings = [field for term in used.values() for field in term.settings]
        for name, term in TERMS.items():
            for field in term.settings:
                if field not in settings and getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(f"{field} belongs to {name}, which has weight 0")
        if self.taught and self.teacher is None:
            raise ValueError(f"{', '.join(self.taught)}: set objective.teacher to {TEACHERS}")
        if self.teacher_digest is not None and self.teacher is None:
            raise ValueError("teacher_digest is the digest of a teacher; set objective.teacher")
        return self

    def pinned_as(self, stored: ObjectiveConfig) -> ObjectiveConfig:
        """Return the objective with the digest that a run filled in, if it has the same teacher."""
        if self.teacher is None or self.teacher != stored.teacher or self.teacher_digest is not None:
            return self
        return self.model_copy(update={"teacher_digest": stored.teacher_digest})

    @property
    def used(self) -> dict[str, Term]:
        """Built-in terms with a weight above 0."""
        return {name: term for name, term in TERMS.items() if getattr(self, name) > 0}

    @property
    def taught(self) -> list[str]:
        """Names of the used terms that need a teacher."""
        return [name for name, term in self.used.items() if term.teacher]

    @property
    def uses_custom(self) -> bool:
        """True if the custom term has a weight above 0."""
        return self.custom is not None and self.custom.weight > 0

    @property
    def reads_outputs(self) -> bool:
        """True if any term depends on the outputs, and so on the last layer."""
        return self.uses_custom or any(not (term.features or term.anchor) for term in self.used.values())

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
        """True if the terms are for a regression; None if they suit both tasks."""
        tasks = (term.regression for term in self.used.values())
        return next((task for task in tasks if task is not None), None)


def why_no_reference(recipe: Any, *, may_idle: bool) -> str:
    """Return why a recipe's teacher, start weights or features do not suit it; "" if they do.

    `may_idle`: settings that changed within the run may leave the teacher without a use.
    """
    objective, taught = recipe.objective, [*recipe.objective.taught]
    if recipe.adversary.loss == "kl_teacher":
        taught.append("adversary.loss kl_teacher")
    if taught and objective.teacher is None:
        return f"{', '.join(taught)}: set objective.teacher to {TEACHERS}"
    terms = [f"objective.{name}" for name, term in TERMS.items() if term.teacher]
    later = {path for change in recipe.settings_to_come().values() for path in change}
    used = taught or may_idle or objective.uses_custom or later & {*terms, "adversary.loss"}
    if objective.teacher is not None and not used:
        return f"objective.teacher has no effect: set {', '.join(terms)} or adversary.loss kl_teacher"
    if any(term.anchor for term in objective.used.values()) and recipe.model.from_ is None:
        return "objective.l2_sp keeps the weights near those that training starts from: set model.from"
    if recipe.training.compile and any(term.features for term in objective.used.values()):
        return "objective.feature_match reads inside the network, so it needs training.compile: false"
    if recipe.model.freeze == "backbone" and not objective.reads_outputs:
        return why_no_gradient(recipe)
    return ""


def why_no_gradient(recipe: Any) -> str:
    """Return the message for a recipe that trains only a layer that no term depends on."""
    used = ", ".join(f"objective.{name}" for name in recipe.objective.used)
    return (
        f"model.freeze: {recipe.model.freeze} trains only the last layer, which {used} does not reach; add another "
        "term, for example objective.adv_ce: 1, or freeze fewer blocks"
    )
