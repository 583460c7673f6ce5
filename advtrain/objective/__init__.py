"""The objective: a weighted sum of named terms. A published method is a row of weights in a recipe."""

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
    """A term of the objective: one row of TERMS is all that it takes."""

    function: Callable[[ForwardCache], Tensor]  # -> (N,)
    description: str = ""  # "weight of ..."
    clean: bool = False  # the clean outputs
    adversarial: bool = False  # the adversarial ones
    gradient: bool = False  # the gradient at the clean input
    regression: bool = False
    distance: bool = False  # 0, and flat, where the adversarial input is the clean one
    settings: tuple[str, ...] = ()  # its fields of TermSettings


#: name of the term, and of its weight in a recipe's objective -> what it is.
TERMS: dict[str, Term] = {
    "clean_ce": Term(terms.clean_ce, "the cross-entropy on clean inputs", clean=True),
    "adv_ce": Term(terms.adv_ce, "the cross-entropy on adversarial inputs", adversarial=True),
    "trades_kl": Term(
        terms.trades_kl,
        "KL(p(x) || p(x_adv)): the beta of TRADES",
        clean=True,
        adversarial=True,
        distance=True,
    ),
    "mart_bce": Term(terms.mart_bce, "MART's boosted cross-entropy on adversarial inputs", adversarial=True),
    "mart_kl": Term(
        terms.mart_kl,
        "MART's misclassification-weighted KL: its lambda",
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
        "the cross-entropy on HAT's helper samples: its gamma",
        adversarial=True,
        settings=("hat_teacher", "hat_factor"),
    ),
    "input_gradient": Term(
        regularizers.input_gradient, "the squared l2 norm of the input gradient", clean=True, gradient=True
    ),
    "cure": Term(
        regularizers.cure, "CURE's curvature: its gamma", clean=True, gradient=True, settings=("cure_h",)
    ),
    "llr_gap": Term(
        regularizers.llr_gap,
        "LLR's departure from linearity: its lambda",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "llr_slope": Term(
        regularizers.llr_slope,
        "LLR's linear change: its mu",
        clean=True,
        adversarial=True,
        gradient=True,
        distance=True,
    ),
    "grad_align": Term(regularizers.grad_align, "GradAlign's one minus cosine", clean=True, gradient=True),
    "clean_mse": Term(
        terms.clean_mse,
        "the squared error on clean inputs, in variances of the training targets",
        clean=True,
        regression=True,
    ),
    "clean_mae": Term(
        terms.clean_mae,
        "the absolute error on clean inputs, in their standard deviations",
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
    """A term of your own."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function, which maps advtrain.objective.ForwardCache to (N,)"""
    weight: Number = Field(default=1.0, ge=0)
    """its weight"""


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
    """Weights of the terms, at least 0; 0 leaves a term out. Madry: adv_ce 1. TRADES: clean_ce 1, trades_kl 6."""

    renamed = {"own": "custom"}
    custom: CustomTermConfig | None = None
    """a term of your own"""

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
        """The terms whose weight is above 0; your own is not among them."""
        return {name: term for name, term in TERMS.items() if getattr(self, name) > 0}

    @property
    def uses_custom(self) -> bool:
        """Whether your own term has a weight above 0."""
        return self.custom is not None and self.custom.weight > 0

    @property
    def adversarial(self) -> bool:
        """Whether any term needs adversarial inputs."""
        return self.uses_custom or any(term.adversarial for term in self.used.values())

    @property
    def regression(self) -> bool | None:
        """Whether the terms are those of a regression; None if only your own term is used."""
        return next((term.regression for term in self.used.values()), None)


class ObjectiveModule(nn.Module):
    """`sum_i weight_i term_i`, with the model inside, so that DDP sees one forward pass a step.

    However many passes the terms need, the gradients of a step are reduced once, in the backward pass.
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
            raise UserError("hat compares a perturbed input with a teacher; this model perturbs embed(x)")
        self.teacher = (teacher,)  # in a tuple: no part of what is trained
        self.adversarial = config.adversarial  # once: the step asks at every batch
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
        """Return the loss per sample (N,), and sums over the batch, detached: each term, correct answers.

        Of a regression the sums of absolute errors stand for the correct answers.

        Args:
            x: (N, ...), the batch's inputs.
            z_adv: (N, ...), what the attack made of embed(x), of most models x itself; None: nothing was attacked.
            y: (N,) int64 labels, or float32 targets.
            threat: the training threat model, as the recipe says it.
            generator: of the terms' draws.
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
