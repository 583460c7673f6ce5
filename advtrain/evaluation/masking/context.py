"""Registry of the masking checks, and the samples and models that a check works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advtrain.attacks import (
    AttackConfig,
    FailureSearch,
    GradientAttack,
    attack_mode,
    input_gradient,
    logits_of,
    predictions,
)
from advtrain.attacks.draws import MeanOfDraws
from advtrain.attacks.losses import AttackLoss
from advtrain.data import Place
from advtrain.evaluation.checks import Check
from advtrain.evaluation.statistics import surely_above
from advtrain.evaluation.worst_case import Evaluator, WorkItem, WorkResult
from advtrain.models.network import attack_view, embeds
from advtrain.threat import ThreatModel

#: Maximum number of samples per check.
NUM_SAMPLES = 100
#: The suite was too weak if another attack breaks significantly more than this share of the robust samples.
BROKEN_SHARE = 0.01
#: Largest difference between outputs for one input that counts as rounding, relative to the logits' std.
ROUNDING = 1e-3
#: The same for a model that computes in 16 bit.
ROUNDING_16_BIT = 0.1

#: True for passed and False for failed, or another verdict.
Answer = bool | Literal["warning", "skipped"]
#: Verdict of a check, the evidence as text, and optional machine-readable data.
Finding = tuple[Answer, str] | tuple[Answer, str, Mapping[str, float]]
#: Samples of a check: spread over all correctly classified ones, the least confident of these, or the least confident
#: of the robust ones.
Selection = Literal["spread", "weakest", "robust"]
#: Builder of a loss: (model, points (N, ...), labels (N,)) -> AttackLoss.
LossBuilder = Callable[[nn.Module, Tensor, Tensor], AttackLoss]


@dataclass(frozen=True)
class MaskingCheck:
    """A check, as a probe of an evaluation.

    Attributes:
        question: question that the check answers, for the report.
        advice: what to do if the check fails or warns.
        judge: function (context) -> Finding; None if the check does not concern the model.
        rows: samples that it works on.
        stochastic: what happens if the model is stochastic and the suite averages over draws. "draw": the check works
            on single draws. "mean": on means over draws. "skip": it is left out.
        inputs_alone: leave the check out unless the perturbed tensor is the whole input in a finite box.
    """

    question: str
    advice: str
    judge: Callable[[CheckContext], Finding | None]
    rows: Selection = "spread"
    stochastic: Literal["draw", "mean", "skip"] = "draw"
    inputs_alone: bool = False

    @property
    def name(self) -> str:
        """Name of the check in the report."""
        return self.judge.__name__.lstrip("_")

    def __call__(self, evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
        """Run the check, and return its `Check` as a dictionary; empty if it does not concern the model."""
        context = CheckContext(evaluator, item, generator)
        about: dict[str, Any] = {"name": self.name, "question": self.question}
        if self.inputs_alone and not context.threat.covers_input:
            reason = "it needs balls around whole inputs in a finite box, but embed(x) is perturbed"
            return Check(**about, verdict="skipped", evidence=reason).model_dump()
        averaged = self.stochastic != "draw" and context.num_draws > 1 and context.is_stochastic
        if averaged and self.stochastic == "skip":
            reason = "the model is stochastic and the suite averages over draws; one draw is too noisy for it"
            return Check(**about, verdict="skipped", evidence=reason).model_dump()
        if averaged:
            context.use_means()
        found = self.judge(context)
        if found is None:
            return {}
        fine, evidence, *data = found
        verdict: Any = fine if isinstance(fine, str) else "passed" if fine else "failed"
        facts = {name: value for name, value in (data[0] if data else {}).items() if math.isfinite(value)}
        facts |= {"on_means": True} if averaged else {}
        advice = self.advice if verdict in ("warning", "failed") else ""
        return Check(**about, verdict=verdict, evidence=evidence, advice=advice, data=facts).model_dump()


CHECKS: dict[str, MaskingCheck] = {}


def check(
    question: str, advice: str, **options: Any
) -> Callable[[Callable[[CheckContext], Finding | None]], MaskingCheck]:
    """Return a decorator that enters a function into CHECKS; arguments as in `MaskingCheck`."""

    def enter(judge: Callable[[CheckContext], Finding | None]) -> MaskingCheck:
        made = MaskingCheck(question, advice, judge, **options)
        CHECKS[made.name] = made
        return made

    return enter


class CheckContext:
    """Correctly classified samples of a check, and which of them the suite did not break.

    `x` is the perturbed tensor, and `model` maps it to logits. For a network that embeds its inputs, `x` is embed(x)
    and `model` is the rest of the network.
    """

    def __init__(self, evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> None:
        self.evaluator, self.generator = evaluator, generator
        self.num_draws = max((attack.num_draws for attack in evaluator.attacks), default=1)
        self.batch_size = evaluator.batch_size
        place = Place(device=evaluator.device)
        parts = list(evaluator.split.take(item.rows).batches(max(1, len(item.rows)), place))
        x, self.y = torch.cat([b.x for b in parts]), torch.cat([b.y for b in parts])
        self.model, self.x, self.threat = attack_view(evaluator.model, x, evaluator.threat)
        self.embeds = embeds(evaluator.model)
        standing = set([] if item.standing is None else item.standing.tolist())
        self.is_robust = torch.tensor([row in standing for row in item.rows.tolist()], device=self.x.device)

    def __len__(self) -> int:
        return len(self.x)

    def use_means(self) -> None:
        """Replace the model by its mean over new draws."""
        self.model = MeanOfDraws(self.model, self.num_draws)

    def repeatable(self) -> nn.Module:
        """Return the model; if it averages over draws, with the same draws in each call."""
        if not isinstance(self.model, MeanOfDraws):
            return self.model
        seed = int(torch.randint(2**31, (1,), generator=self.generator, device=self.x.device))
        return MeanOfDraws(self.model.model, self.num_draws, seed)

    def outputs(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return logits (N, K) float32."""
        return logits_of(model or self.model, x, self.batch_size)

    def gradients(self, x: Tensor, build: LossBuilder, model: nn.Module | None = None) -> Tensor:
        """Return the gradient (N, ...) of a loss of the labels at points x (N, ...)."""
        model = model or self.model
        with attack_mode(model):
            parts = zip(torch.split(x, self.batch_size), torch.split(self.y, self.batch_size), strict=True)
            return torch.cat([input_gradient(model, z, build(model, z, y))[0] for z, y in parts])

    def broken(
        self,
        attacks: list[FailureSearch],
        threat: ThreatModel | None = None,
        *,
        model: nn.Module | None = None,
        among: Tensor | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return which samples at least one of the attacks breaks, (N,) bool.

        Only the samples flagged in `among` (N,) are attacked, by default all. `x` (N, ...) and `y` (N,) replace the
        inputs and labels of the context.
        """
        x, y = self.x if x is None else x, self.y if y is None else y
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for attack in attacks:
            for number in range(attack.num_rounds):
                left = ~found if among is None else among & ~found
                rows = left.nonzero().flatten()
                if len(rows) == 0:
                    continue
                balls = (threat or self.threat).rows(rows)
                _, fooled = attack.find_failures(
                    model or self.model,
                    x[rows],
                    y[rows],
                    balls,
                    self.generator,
                    number,
                    self.batch_size,
                )
                found[rows[fooled]] = True
        return found

    @cached_property
    def noise(self) -> float:
        """Largest difference between two passes, over the logits' std.

        It is measured at the samples and at points near them.
        """
        points = torch.cat([self.x, self.threat.random_start(self.x, self.generator)])
        first, second = self.outputs(points), self.outputs(points)
        return float((first - second).abs().max()) / spread(first)

    @property
    def is_stochastic(self) -> bool:
        """True if two passes differ by more than rounding."""
        return self.noise > ROUNDING

    def endpoints(self, number: int) -> Tensor:
        """Return what PGD-10 finds for the first `number` samples, (n, ...)."""
        attack = pgd(num_steps=10, loss="margin")
        rows = torch.arange(min(number, len(self)), device=self.x.device)
        return attack(self.model, self.x[rows], self.y[rows], self.threat.rows(rows), self.generator)

    def gives_one_answer(self) -> bool:
        """Return whether the model predicts one class for all samples and random images."""
        noise = torch.rand(self.x.shape, generator=self.generator, device=self.x.device)
        noise = self.threat.low + (self.threat.high - self.threat.low) * noise
        answers = predictions(self.outputs(torch.cat([self.x, noise])))
        return bool((answers == answers[0]).all())

    def breaks_robust(self, attacks: list[FailureSearch], **options: Any) -> tuple[bool, str, int]:
        """Test whether attacks break significantly more than BROKEN_SHARE of the robust samples.

        Return the result, the number of broken samples as text, and the number itself.
        """
        total = int(self.is_robust.sum())
        count = int(self.broken(attacks, among=self.is_robust, **options).sum())
        return surely_above(count, total, BROKEN_SHARE), f"{count} of {total} robust samples", count


def pgd(**settings: Any) -> GradientAttack:
    """Return PGD with the given settings of an AttackConfig."""
    return GradientAttack(AttackConfig.model_validate(settings))


def norm_of_ones(s: CheckContext) -> float:
    """Return the norm of an input of ones, in the threat model's norm."""
    dimension = s.x[0].numel()
    norms: dict[str, float] = {"linf": 1.0, "l2": dimension**0.5, "l1": float(dimension)}
    return norms[s.threat.norm]


def spread(logits: Tensor) -> float:
    """Return the standard deviation of all logits, above 0."""
    return float(logits.std().clamp_min(torch.finfo(logits.dtype).tiny))
