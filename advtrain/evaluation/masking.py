"""Is a robust accuracy true, or do the attacks fail for reasons that a better attack would not mind?

Checks for gradient masking (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv 1802.00420; the flags of
AutoAttack). Each looks at some correctly classified samples and gives a verdict, its evidence, and what to do.
Comparisons are of the same samples: one attack counts as stronger than another if an exact one-sided sign test over
the samples that only one of them broke has p < 0.01.
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

#: At most so many samples are looked at, and so many that the suite left standing.
NUM_SAMPLES = 100
#: A gradient that is exactly zero on a larger share of samples hides the way up.
ZERO_SHARE = 0.1
#: A further attack that surely breaks more than this share of the standing samples shows that the suite was too weak.
BROKEN_SHARE = 0.01
#: Outputs for the same input that differ by more than this, of their spread, are not rounding.
ROUNDING = 1e-3


#: What a check found: whether all is well, the evidence in words, and what code may decide on.
Finding = tuple[bool, str] | tuple[bool, str, dict[str, bool | float]]


Probe = Callable[[Evaluator, WorkItem, torch.Generator], WorkResult]
CHECKS: dict[str, Probe] = {}


def _check(
    question: str, advice: str, *, single_draws: bool = False, inputs_alone: bool = False
) -> Callable[[Callable[[CheckContext], Finding]], Probe]:
    """Enter a function (context) -> (all is well, evidence) into CHECKS.

    Args:
        question: what the check finds out, for people.
        advice: what to do if the answer is bad.
        single_draws: skip it for a random model that the suite averages over draws of: a single pass is noisy.
        inputs_alone: skip it where the perturbed tensor is not the whole input in a finite box.
    """

    def skipped(context: CheckContext) -> str:
        if single_draws and context.averaged and context.change_between_passes() > ROUNDING:
            return "the suite averages over draws of a random model, which errs by luck in single ones"
        if inputs_alone and not context.threat.covers_input:
            return "it searches balls around whole inputs in a finite box, and here embed(x) is perturbed"
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
    """What a check looks at: correctly classified samples, and which of them the suite left standing.

    `x` is what is perturbed, `model` maps it to logits: of a network that embeds its inputs embed(x), and what follows.
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
        """Return which samples some of the attacks breaks, (N,) bool; of those `among`, by default all."""
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
        """Return by how much two passes over the same inputs differ, of the logits' spread."""
        first, second = self.outputs(self.x), self.outputs(self.x)
        return float((first - second).abs().max()) / _spread(first)

    def gives_one_answer(self) -> bool:
        """Whether the model takes the samples and random images all for the same class."""
        noise = torch.rand(self.x.shape, generator=self.generator, device=self.x.device)
        noise = self.threat.low + (self.threat.high - self.threat.low) * noise
        answers = predictions(self.outputs(torch.cat([self.x, noise])))
        return bool((answers == answers[0]).all())

    def breaks_robust(self, attacks: list[FailureSearch], **options: Any) -> tuple[bool, str]:
        """Whether attacks surely break more than BROKEN_SHARE of the standing samples, and the count in words."""
        total = int(self.is_robust.sum())
        count = int(self.broken(attacks, among=self.is_robust, **options).sum())
        return surely_above(count, total, BROKEN_SHARE), f"{count} of {total} standing samples"


def _pgd(**values: Any) -> GradientAttack:
    return GradientAttack(AttackConfig.model_validate(values))


def _spread(logits: Tensor) -> float:
    return float(logits.std().clamp_min(torch.finfo(logits.dtype).tiny))


@_check(
    "Is an attack of one step weaker than one of many?",
    "iterating does not help, so gradients mislead: look for non-differentiable or saturating layers",
    single_draws=True,
)
def _one_step(s: CheckContext) -> tuple[bool, str]:
    one, many = s.broken([_pgd(name="fgsm")]), s.broken([_pgd(num_steps=20)])
    only_one, only_many = int((one & ~many).sum()), int((many & ~one).sum())
    evidence = f"FGSM broke {int(one.sum())} of {len(s)} samples, PGD-20 {int(many.sum())}"
    return sign_test(only_one, only_many) >= 0.01, evidence


@_check(
    "Does a larger radius help the attack, up to every image being allowed?",
    "an attack that is free to draw any image must succeed: gradients are masked; use attacks without gradients, or "
    "through a differentiable stand-in (BPDA)",
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
    shares = ", ".join(f"{int(b.sum())} at {r:.4g}" for r, b in zip(radii, broken, strict=True))
    evidence = f"of {len(s)} samples PGD-20 broke {shares}"
    if not math.isfinite(span):
        return grows, f"{evidence}; what is perturbed has no bounds"
    suite = build_suite("pgd-100,apgd-ce,apgd-t-50x3")
    left = len(s) - int(s.broken(suite, replace(s.threat, eps=whole * span)).sum())
    evidence += f"; with every image allowed {left} stood"
    if left and s.gives_one_answer():
        return grows, f"{evidence}: the model gives one answer whatever the image"
    return grows and left <= BROKEN_SHARE * len(s), evidence


@_check(
    "Is an attack without gradients weaker than one with them?",
    "a search that sees outputs alone finds what gradients do not: they are masked; the figure is no bound",
    single_draws=True,
    inputs_alone=True,
)
def _black_box(s: CheckContext) -> tuple[bool, str]:
    white, black = s.broken(build_suite("apgd-ce-50,apgd-dlr-50")), s.broken([Square(1000)])
    counts = int(white.sum()), int(black.sum())
    evidence = f"apgd-ce-50 and apgd-dlr-50 broke {counts[0]} of {len(s)} samples, square-1000 {counts[1]}"
    return sign_test(int((black & ~white).sum()), int((white & ~black).sum())) >= 0.01, evidence


class _Rescaled(nn.Module):
    """The model with logits divided by their spread: the same decisions, and a cross-entropy that does not
    saturate."""

    def __init__(self, model: nn.Module, spread: float) -> None:
        super().__init__()
        self.model, self.spread = model, spread

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x) / self.spread
        return out


@_check(
    "Do gradients of the loss reach the input, and if they vanish, do rescaled logits change the result?",
    "the loss is flat where the decision is not: evaluate with attacks that no scale misleads (apgd-dlr, apgd-t, "
    "square), or remove what cuts the gradient",
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
    evidence += f", on {100 * shares[1]:.0f} % with rescaled logits, with which apgd-ce broke {count}"
    return not breaks and shares[1] <= ZERO_SHARE, evidence


@_check(
    "Does the model answer the same question twice the same way?",
    "its outputs are random, and attacks that ask once are misled: evaluate with --suite rand, which averages over "
    "draws",
)
def _stochastic(s: CheckContext) -> Finding:
    change = s.change_between_passes()
    evidence = f"two passes over the same input differ by {change:.2g} of the logits' spread"
    if s.averaged and change > ROUNDING:
        return True, f"{evidence}; the suite averages over draws", {"averages_over_draws": True}
    return change <= ROUNDING, evidence


@_check(
    "Does each sample's output depend on that sample alone?",
    "outputs depend on the other samples in the batch (a norm that uses the batch's statistics): put the model into "
    "evaluation mode before it is saved, or exchange the layer",
)
def _batch(s: CheckContext) -> tuple[bool, str]:
    together = s.outputs(s.x)
    with attack_mode(s.model), torch.no_grad():
        alone = torch.cat([s.model(s.x[i : i + 1]).float() for i in range(min(8, len(s)))])
        again = torch.cat([s.model(s.x[i : i + 1]).float() for i in range(min(8, len(s)))])
    scale = _spread(together)
    noise = float((alone - again).abs().max()) / scale  # a random model is another check's affair
    change = float((together[: len(alone)] - alone).abs().max()) / scale
    evidence = (
        f"outputs of a sample alone and in a batch of {min(len(s), s.batch_size)} differ by {change:.2g}"
    )
    return change <= max(ROUNDING, 3 * noise), f"{evidence} of the logits' spread"


@_check(
    "Does the output change with the input, however little?",
    "the model rounds its input or its output, so that gradients are zero or made up: evaluate with attacks without "
    "gradients (square), or through a differentiable stand-in (BPDA)",
)
def _steps_inside(s: CheckContext) -> tuple[bool, str]:
    # On steps of 1/255 or wider, none of the data's own grey levels moves to another step by this.
    little = replace(s.threat, norm="linf", eps=1e-4).random_start(s.x, s.generator)
    same = float((s.outputs(s.x) == s.outputs(little)).all(1).float().mean())
    evidence = (
        f"noise of 1e-4 leaves every output exactly as it was on {100 * same:.0f} % of {len(s)} samples"
    )
    return same <= ZERO_SHARE, evidence


@_check(
    "Do more steps and restarts leave the result as it is?",
    "the attacks have not converged: evaluate with a stronger suite (autoattack), or more steps",
    single_draws=True,
)
def _budget(s: CheckContext) -> tuple[bool, str]:
    more: list[FailureSearch] = [_pgd(num_steps=200, num_restarts=2), _pgd(num_steps=200, loss="margin")]
    breaks, count = s.breaks_robust(more)
    return not breaks, f"PGD-200 from two starts and on the margin broke {count}"


def _embedding(evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
    """A warning for a model that embeds its inputs; nothing for others."""
    if not embeds(evaluator.model):
        return {}
    return Check(
        name="embedding",
        question="Is the ball around the inputs themselves?",
        verdict="warning",
        evidence="the attacks perturbed embed(x), so the figure is no bound for changes of the input",
        advice="report the accuracy under changes of the input besides",
    ).model_dump()


CHECKS["embedding"] = _embedding
