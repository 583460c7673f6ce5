"""Checks for gradient masking, which makes attacks fail although the model is not robust.

The checks follow Carlini et al. (2019, arXiv 1902.06705), Athalye et al. (2018, arXiv 1802.00420) and the flags of
AutoAttack. Each check runs on correctly classified samples and returns a verdict, evidence and advice. Attacks are
compared on the same samples: one counts as stronger than another if an exact one-sided sign test over the samples that
only one of them broke has p < 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.attacks import (
    AttackConfig,
    FailureSearch,
    GradientAttack,
    Square,
    attack_mode,
    build_suite,
    input_gradient,
    predictions,
)
from advtrain.attacks.losses import build_cross_entropy
from advtrain.data import Place
from advtrain.evaluation.checks import Check
from advtrain.evaluation.statistics import sign_test, surely_above
from advtrain.evaluation.worst_case import Evaluator, WorkItem, WorkResult
from advtrain.models.network import attack_view, embeds
from advtrain.threat import ThreatModel

#: Maximum number of correctly classified samples per check.
NUM_SAMPLES = 100
#: Largest accepted share of samples with a gradient, or an output change, of exactly zero.
ZERO_SHARE = 0.1
#: The suite was too weak if another attack breaks significantly more than this share of the robust samples.
BROKEN_SHARE = 0.01
#: Largest difference between outputs for one input that counts as rounding, relative to the logits' std.
ROUNDING = 1e-3


#: Result of a check: passed or not, the evidence as text, and optional machine-readable data.
Finding = tuple[bool, str] | tuple[bool, str, dict[str, bool | float]]


Probe = Callable[[Evaluator, WorkItem, torch.Generator], WorkResult]
CHECKS: dict[str, Probe] = {}


def _check(
    question: str, advice: str, *, single_draws: bool = False, inputs_alone: bool = False
) -> Callable[[Callable[[CheckContext], Finding]], Probe]:
    """Return a decorator that registers a function (context) -> Finding in CHECKS.

    Args:
        question: question that the check answers, for the report.
        advice: what to do if the check fails.
        single_draws: skip the check for a stochastic model if the suite averages over draws, as one pass is noisy.
        inputs_alone: skip the check unless the perturbed tensor is the whole input in a finite box.
    """

    def skipped(context: CheckContext) -> str:
        if single_draws and context.averaged and context.change_between_passes() > ROUNDING:
            return "the model is stochastic and the suite averages over draws; one draw is too noisy for it"
        if inputs_alone and not context.threat.covers_input:
            return "it needs balls around whole inputs in a finite box, but embed(x) is perturbed"
        return ""

    def enter(function: Callable[[CheckContext], Finding]) -> Probe:
        name = function.__name__.lstrip("_")

        def probe(evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
            context = CheckContext(evaluator, item, generator)
            if reason := skipped(context):
                return Check(name=name, question=question, verdict="skipped", evidence=reason).model_dump()
            fine, evidence, *data = function(context)
            verdict: Any = "passed" if fine else "failed"
            check = Check(
                name=name,
                question=question,
                verdict=verdict,
                evidence=evidence,
                advice="" if fine else advice,
                data=data[0] if data else {},
            )
            return check.model_dump()

        CHECKS[name] = probe
        return probe

    return enter


class CheckContext:
    """Correctly classified samples of a check, and which of them the suite did not break.

    `x` is the perturbed tensor, and `model` maps it to logits. For a network that embeds its inputs, `x` is embed(x)
    and `model` is the rest of the network.
    """

    def __init__(self, evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> None:
        self.generator = generator
        self.averaged = any(attack.num_draws > 1 for attack in evaluator.attacks)
        self.batch_size = evaluator.batch_size
        place = Place(device=evaluator.device)
        parts = list(evaluator.split.take(item.rows).batches(len(item.rows), place))
        x, self.y = torch.cat([b.x for b in parts]), torch.cat([b.y for b in parts])
        self.model, self.x, self.threat = attack_view(evaluator.model, x, evaluator.threat)
        self.embeds = embeds(evaluator.model)
        standing = set([] if item.standing is None else item.standing.tolist())
        self.is_robust = torch.tensor([row in standing for row in item.rows.tolist()], device=self.x.device)

    def __len__(self) -> int:
        return len(self.x)

    def outputs(self, x: Tensor) -> Tensor:
        """Return logits (N, K) float32."""
        with attack_mode(self.model), torch.no_grad():
            parts = [self.model(part).float() for part in torch.split(x, self.batch_size)]
        return torch.cat(parts)

    def broken(
        self,
        attacks: list[FailureSearch],
        threat: ThreatModel | None = None,
        *,
        model: nn.Module | None = None,
        among: Tensor | None = None,
    ) -> Tensor:
        """Return which samples at least one of the attacks breaks, (N,) bool.

        Only the samples flagged in `among` (N,) are attacked, by default all.
        """
        found = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        for attack in attacks:
            for number in range(attack.num_rounds):
                left = ~found if among is None else among & ~found
                rows = left.nonzero().flatten()
                for part in torch.split(rows, self.batch_size) if len(rows) else ():
                    _, fooled = attack.find_failures(
                        model or self.model,
                        self.x[part],
                        self.y[part],
                        (threat or self.threat).rows(part),
                        self.generator,
                        number,
                    )
                    found[part[fooled]] = True
        return found

    def change_between_passes(self) -> float:
        """Return the largest difference between two passes, divided by the logits' std."""
        first, second = self.outputs(self.x), self.outputs(self.x)
        return float((first - second).abs().max()) / _spread(first)

    def gives_one_answer(self) -> bool:
        """Return whether the model predicts one class for all samples and random images."""
        noise = torch.rand(self.x.shape, generator=self.generator, device=self.x.device)
        noise = self.threat.low + (self.threat.high - self.threat.low) * noise
        answers = predictions(self.outputs(torch.cat([self.x, noise])))
        return bool((answers == answers[0]).all())

    def breaks_robust(self, attacks: list[FailureSearch], **options: Any) -> tuple[bool, str]:
        """Test whether attacks break significantly more than BROKEN_SHARE of the robust samples.

        Return the result, and the number of broken samples as text.
        """
        total = int(self.is_robust.sum())
        count = int(self.broken(attacks, among=self.is_robust, **options).sum())
        return surely_above(count, total, BROKEN_SHARE), f"{count} of {total} robust samples"


def _pgd(**values: Any) -> GradientAttack:
    return GradientAttack(AttackConfig.model_validate(values))


def _spread(logits: Tensor) -> float:
    return float(logits.std().clamp_min(torch.finfo(logits.dtype).tiny))


@_check(
    "Is a one-step attack weaker than a multi-step attack?",
    "more steps do not help, so the gradients mislead: look for non-differentiable or saturating layers",
    single_draws=True,
)
def _one_step(s: CheckContext) -> tuple[bool, str]:
    one, many = s.broken([_pgd(name="fgsm")]), s.broken([_pgd(num_steps=20)])
    only_one, only_many = int((one & ~many).sum()), int((many & ~one).sum())
    evidence = f"FGSM broke {int(one.sum())} of {len(s)} samples, PGD-20 {int(many.sum())}"
    return sign_test(only_one, only_many) >= 0.01, evidence


@_check(
    "Do attacks break more samples at larger radii, and all samples if any image is allowed?",
    "an unbounded attack must succeed, so the gradients are masked: use gradient-free attacks, or "
    "a differentiable approximation (BPDA)",
)
def _radius(s: CheckContext) -> tuple[bool, str]:
    dimension = s.x[0].numel()
    whole = {"linf": 1.0, "l2": dimension**0.5, "l1": float(dimension)}[s.threat.norm]
    span = s.threat.high - s.threat.low
    steps = build_suite("pgd-20")
    radii = [s.threat.eps, 2 * s.threat.eps, 4 * s.threat.eps]
    broken = [s.broken(steps, replace(s.threat, eps=min(r, whole * span))) for r in radii]
    pairs = zip(broken[:-1], broken[1:], strict=True)
    grows = all(sign_test(int((a & ~b).sum()), int((b & ~a).sum())) >= 0.01 for a, b in pairs)
    shares = ", ".join(f"{int(b.sum())} at eps {r:.4g}" for r, b in zip(radii, broken, strict=True))
    evidence = f"out of {len(s)} samples, PGD-20 broke {shares}"
    if not math.isfinite(span):
        return grows, f"{evidence}; the perturbed tensor has no bounds"
    suite = build_suite("pgd-100,apgd-ce,apgd-t-50x3")
    left = len(s) - int(s.broken(suite, replace(s.threat, eps=whole * span)).sum())
    evidence += f"; with any image allowed, {left} stayed robust"
    if left and s.gives_one_answer():
        return grows, f"{evidence}: the model predicts the same class for every image"
    return grows and left <= BROKEN_SHARE * len(s), evidence


@_check(
    "Is a gradient-free attack weaker than gradient-based attacks?",
    "a gradient-free attack is stronger, so the gradients are masked: do not trust the robust accuracy",
    single_draws=True,
    inputs_alone=True,
)
def _black_box(s: CheckContext) -> tuple[bool, str]:
    white, black = s.broken(build_suite("apgd-ce-50,apgd-dlr-50")), s.broken([Square(1000)])
    counts = int(white.sum()), int(black.sum())
    evidence = f"apgd-ce-50 and apgd-dlr-50 broke {counts[0]} of {len(s)} samples, square-1000 {counts[1]}"
    return sign_test(int((black & ~white).sum()), int((white & ~black).sum())) >= 0.01, evidence


class _Rescaled(nn.Module):
    """Model with logits divided by their std.

    The predictions are the same, and the cross-entropy does not saturate.
    """

    def __init__(self, model: nn.Module, spread: float) -> None:
        super().__init__()
        self.model, self.spread = model, spread

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x) / self.spread
        return out


@_check(
    "Do loss gradients reach the input, and if some vanish, do rescaled logits give the same result?",
    "the loss is flat, but the decision is not: evaluate with scale-invariant attacks (apgd-dlr, apgd-t, "
    "square), or remove the layer that blocks the gradient",
)
def _gradients(s: CheckContext) -> tuple[bool, str]:
    rescaled = _Rescaled(s.model, _spread(s.outputs(s.x)))
    shares = []
    for model in (s.model, rescaled):
        with attack_mode(model):
            size = torch.cat(
                [
                    input_gradient(model, x, build_cross_entropy(model, x, y))[0].flatten(1).abs().amax(1)
                    for x, y in zip(*(torch.split(v, s.batch_size) for v in (s.x, s.y)), strict=True)
                ]
            )
        shares.append(float((size == 0).float().mean()))
    evidence = f"the gradient is exactly 0 on {100 * shares[0]:.0f} % of {len(s)} samples"
    if shares[0] == 0:
        return True, evidence
    breaks, count = s.breaks_robust(build_suite("apgd-ce"), model=rescaled)
    evidence += f", on {100 * shares[1]:.0f} % with rescaled logits; on these, apgd-ce broke {count}"
    return not breaks and shares[1] <= ZERO_SHARE, evidence


@_check(
    "Are two outputs for the same input equal?",
    "the outputs are random, which misleads attacks that use single draws: evaluate with --suite rand, which "
    "averages over draws",
)
def _stochastic(s: CheckContext) -> Finding:
    change = s.change_between_passes()
    evidence = f"two passes over the same input differ by at most {change:.2g} times the logits' std"
    if s.averaged and change > ROUNDING:
        return True, f"{evidence}; the suite averages over draws", {"averages_over_draws": True}
    return change <= ROUNDING, evidence


@_check(
    "Does the output for a sample depend only on that sample?",
    "outputs depend on the other samples in the batch, for example through batch statistics: save the model in "
    "evaluation mode, or replace the layer",
)
def _batch(s: CheckContext) -> tuple[bool, str]:
    together = s.outputs(s.x)
    with attack_mode(s.model), torch.no_grad():
        alone = torch.cat([s.model(s.x[i : i + 1]).float() for i in range(min(8, len(s)))])
        again = torch.cat([s.model(s.x[i : i + 1]).float() for i in range(min(8, len(s)))])
    scale = _spread(together)
    noise = float((alone - again).abs().max()) / scale  # randomness is for the check `stochastic`
    change = float((together[: len(alone)] - alone).abs().max()) / scale
    evidence = (
        f"outputs for one sample alone and in a batch of {min(len(s), s.batch_size)} differ by {change:.2g}"
    )
    return change <= max(ROUNDING, 3 * noise), f"{evidence} times the logits' std"


@_check(
    "Does the output change if the input changes very little?",
    "the model rounds its input or output, so its gradients are zero or artificial: evaluate with gradient-free "
    "attacks (square), or with a differentiable approximation (BPDA)",
)
def _steps_inside(s: CheckContext) -> tuple[bool, str]:
    # 1e-4 is too small to move an 8-bit gray level to another step of a quantizer with steps of 1/255 or more.
    little = replace(s.threat, norm="linf", eps=1e-4).random_start(s.x, s.generator)
    same = float((s.outputs(s.x) == s.outputs(little)).all(1).float().mean())
    evidence = f"noise of 1e-4 leaves all outputs exactly unchanged on {100 * same:.0f} % of {len(s)} samples"
    return same <= ZERO_SHARE, evidence


@_check(
    "Does the result stay the same with more steps and restarts?",
    "the attacks have not converged: evaluate with a stronger suite (autoattack) or more steps",
    single_draws=True,
)
def _budget(s: CheckContext) -> tuple[bool, str]:
    more: list[FailureSearch] = [_pgd(num_steps=200, num_restarts=2), _pgd(num_steps=200, loss="margin")]
    breaks, count = s.breaks_robust(more)
    return not breaks, f"PGD-200 with two restarts, and PGD-200 on the margin loss, broke {count}"


def _embedding(evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
    """Return a warning for a model that embeds its inputs, and nothing for other models."""
    if not embeds(evaluator.model):
        return {}
    return Check(
        name="embedding",
        question="Does the threat model apply to the inputs themselves?",
        verdict="warning",
        evidence="the attacks perturbed embed(x), so the result does not cover changes of the input",
        advice="also report the accuracy under changes of the input",
    ).model_dump()


CHECKS["embedding"] = _embedding
