"""Checks with other attacks, none of which may be stronger than the suite.

Two attacks are compared on the same samples. One counts as stronger than another if an exact one-sided sign test over
the samples that only one of them broke has p < 0.01.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks import (
    FailureSearch,
    RayS,
    Square,
    StudentTransfer,
    build_suite,
)
from advtrain.evaluation.masking.context import (
    BROKEN_SHARE,
    Answer,
    CheckContext,
    Finding,
    check,
    norm_of_ones,
    pgd,
)
from advtrain.evaluation.statistics import sign_test, surely_above
from advtrain.threat import ThreatModel

#: A check only warns if the other attack breaks surely no more than this share of the samples in addition.
LARGE_SHARE = 0.05
#: Numbers of gray levels of rounded images: 8 bit and 4 bit.
LEVELS = (256, 16)


def _graded(stronger: bool, count: int, total: int) -> bool | Literal["warning"]:
    """Return the verdict for `count` of `total` samples that only the other attack broke."""
    if not stronger:
        return True
    return False if surely_above(count, total, LARGE_SHARE) else "warning"


@check(
    "Is a one-step attack weaker than a multi-step attack?",
    "more steps do not help, so the gradients mislead: look for non-differentiable or saturating layers",
    stochastic="skip",
)
def _one_step(s: CheckContext) -> Finding:
    one, many = s.broken([pgd(name="fgsm")]), s.broken([pgd(num_steps=20)])
    only_one, only_many = int((one & ~many).sum()), int((many & ~one).sum())
    evidence = f"FGSM broke {int(one.sum())} of {len(s)} samples, PGD-20 {int(many.sum())}"
    data = {"samples": len(s), "one_step": int(one.sum()), "multi_step": int(many.sum())}
    return sign_test(only_one, only_many) >= 0.01, evidence, data


#: Radii of the check `radius`, in multiples of the threat model's.
RADII = (1.0, 1.5, 2.0, 3.0, 4.0)


@check(
    "Do attacks break more samples at larger radii, and all samples if any image is allowed?",
    "an unbounded attack must succeed, so the gradients are masked: use gradient-free attacks, or "
    "a differentiable approximation (BPDA)",
)
def _radius(s: CheckContext) -> Finding:
    whole, span = norm_of_ones(s), s.threat.high - s.threat.low
    steps = build_suite("pgd-20")
    radii = [factor * s.threat.eps for factor in RADII]
    broken = [s.broken(steps, replace(s.threat, eps=min(r, whole * span))) for r in radii]
    pairs = [(a, b) for k, a in enumerate(broken) for b in broken[k + 1 :]]
    grows = all(sign_test(int((a & ~b).sum()), int((b & ~a).sum())) >= 0.01 for a, b in pairs)
    shares = ", ".join(f"{int(b.sum())} at eps {r:.4g}" for r, b in zip(radii, broken, strict=True))
    evidence = f"out of {len(s)} samples, PGD-20 broke {shares}"
    if not math.isfinite(span):
        return grows, f"{evidence}; the perturbed tensor has no bounds"
    left = int((~_broken_unbounded(s, replace(s.threat, eps=whole * span))).sum())
    evidence += f"; with any image allowed, {left} stayed robust"
    if left and s.gives_one_answer():
        return grows, f"{evidence}: the model predicts the same class for every image"
    return grows and left <= BROKEN_SHARE * len(s), evidence, {"samples": len(s), "left": left}


def _broken_unbounded(s: CheckContext, everything: ThreatModel) -> Tensor:
    """Return the samples that an attack breaks if any image is allowed, (N,) bool.

    A sample must be broken from random starts and also from the mean image, so that a model cannot be honest just
    where random images lie.
    """
    suite = build_suite("pgd-100,apgd-ce,apgd-t-50x3")
    found = s.broken(suite, everything)
    middle = s.x.mean(0, keepdim=True).expand_as(s.x)
    near = (
        0.5 * (s.x + middle)
    ).contiguous()  # half way to the mean: its contrast is low, and its class often open
    right = s.outputs(near).argmax(1) == s.y
    return found & (s.broken(suite, everything, x=near, among=right & found) | ~right)


@check(
    "Is a gradient-free attack weaker than gradient-based attacks?",
    "a gradient-free attack is stronger, so the gradients are masked: do not trust the robust accuracy, and add "
    "square to the suite",
    rows="weakest",
    stochastic="mean",
    inputs_alone=True,
)
def _black_box(s: CheckContext) -> Finding:
    queries = 1000 if s.num_draws == 1 else 300
    white, black = s.broken(build_suite("apgd-ce-50,apgd-dlr-50")), s.broken([Square(queries)])
    evidence = (
        f"of the {len(s)} least confident samples, apgd-ce-50 and apgd-dlr-50 broke {int(white.sum())}, "
        f"square-{queries} {int(black.sum())}"
    )
    more, fewer = int((black & ~white).sum()), int((white & ~black).sum())
    data = {"samples": len(s), "gradient": int(white.sum()), "square": int(black.sum())}
    return _graded(sign_test(more, fewer) < 0.01, more - fewer, len(s)), evidence, data


@check(
    "Do attacks that see only the predicted class fail on the samples that the suite left?",
    "an attack without scores or gradients is stronger than the suite, so the scores mislead or the suite is too weak: "
    "do not trust the robust accuracy, and add rays and student to the suite",
    rows="robust",
    stochastic="mean",
    inputs_alone=True,
)
def _labels_only(s: CheckContext) -> Finding:
    attacks: list[FailureSearch] = [RayS(1000 if s.num_draws == 1 else 300), StudentTransfer()]
    stronger, count, number = s.breaks_robust(attacks)
    evidence = f"{attacks[0].name} and a student taught on predicted classes broke {count}"
    total = int(s.is_robust.sum())
    return _graded(stronger, number, total), evidence, {"broken": number, "robust": total}


class OnGrid(nn.Module):
    """Model on inputs rounded to steps from `low` on, with a straight-through gradient."""

    def __init__(self, model: nn.Module, low: float, step: float) -> None:
        super().__init__()
        self.model, self.low, self.step = model, low, step

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of the rounded inputs."""
        rounded = ((x.detach() - self.low) / self.step).round() * self.step + self.low
        logits: Tensor = self.model(x + (rounded - x.detach()))
        return logits


@check(
    "Is an attack on images of 256 or 16 levels no stronger than the same attack on all images?",
    "the model answers differently off the grid of such images, which the attacks leave: evaluate rounded images",
    rows="robust",
    stochastic="mean",
    inputs_alone=True,
)
def _grid(s: CheckContext) -> Finding:
    span = s.threat.high - s.threat.low
    steps = 50 if s.num_draws == 1 else 10
    attacks: list[FailureSearch] = [pgd(num_steps=steps), pgd(num_steps=steps, loss="margin")]
    verdicts: list[Any] = []
    data: dict[str, float] = {"robust": int(s.is_robust.sum())}
    evidence = f"of {int(s.is_robust.sum())} robust samples PGD-{steps} broke"
    for levels in LEVELS:
        size = span / (levels - 1)
        lost = norm_of_ones(s) * size / 2
        if s.threat.eps <= lost:
            continue  # rounding moves images out of the ball
        how: dict[str, Any] = {"threat": replace(s.threat, eps=s.threat.eps - lost), "among": s.is_robust}
        plain, grid = (
            s.broken(attacks, **how),
            s.broken(attacks, model=OnGrid(s.model, s.threat.low, size), **how),
        )
        more, fewer = int((grid & ~plain).sum()), int((plain & ~grid).sum())
        verdicts.append(_graded(sign_test(more, fewer) < 0.01, more - fewer, len(s)))
        data |= {f"all_{levels}": int(plain.sum()), f"rounded_{levels}": int(grid.sum())}
        evidence += f" {int(plain.sum())}, at {levels} levels {int(grid.sum())};"
    if not verdicts:
        return "skipped", "rounding to 8 bit moves an image out of the ball"
    worst: Answer = False if False in verdicts else "warning" if "warning" in verdicts else True
    return worst, evidence.rstrip(";"), data


#: Radii of the check `parts`, in multiples of the threat model's.
SMALLER_RADII = (0.25, 0.5, 0.75)


@check(
    "Do attacks fail that use only a part of the ball?",
    "a smaller ball, or changes of some elements only, break samples that count as robust in the whole ball: the model "
    "recognizes what usual attacks look like",
    rows="robust",
    stochastic="mean",
)
def _parts(s: CheckContext) -> Finding:
    attack = pgd(num_steps=20 if s.num_draws == 1 else 5, loss="margin")
    found = torch.zeros_like(s.is_robust)
    balls = [s.threat.scaled(factor) for factor in SMALLER_RADII]
    masks = [*_halves(s), _foreground(s)]
    balls += [
        replace(s.threat, free=mask if s.threat.free is None else s.threat.free & mask) for mask in masks
    ]
    for ball in balls:
        found |= s.broken([attack], ball, among=s.is_robust & ~found)
    count, total = int(found.sum()), int(s.is_robust.sum())
    evidence = f"{attack.name} in {len(balls)} parts of the ball broke {count} of {total} robust samples"
    data = {"broken": count, "robust": total}
    return _graded(surely_above(count, total, BROKEN_SHARE), count, total), evidence, data


def _halves(s: CheckContext) -> list[Tensor]:
    """Return masks (N, ...) of the elements that may change: two halves in each direction, and at random."""
    halves = [torch.rand(s.x.shape, generator=s.generator, device=s.x.device) < 0.5]
    for dim in range(1, s.x.dim()):
        size = s.x.shape[dim]
        if size > 1:
            first = (torch.arange(size, device=s.x.device) < size // 2).view(-1, *[1] * (s.x.dim() - 1 - dim))
            halves.append(first.expand_as(s.x))
    return [half for first in halves for half in (first, ~first)]


def _foreground(s: CheckContext) -> Tensor:
    """Return a mask (N, ...) of the elements that differ from their sample's median, and their neighbours."""
    middle = s.x.flatten(1).median(1).values.view(-1, *[1] * (s.x.dim() - 1))
    differs = (s.x - middle).abs() > 0.1 * (s.x.flatten(1).amax(1) - s.x.flatten(1).amin(1)).view_as(middle)
    return F.max_pool2d(differs.float(), 3, 1, 1) > 0 if s.x.dim() == 4 else differs


@check(
    "Does the result stay the same with more steps and restarts?",
    "the attacks have not converged: evaluate with a stronger suite (autoattack) or more steps",
    stochastic="skip",
)
def _budget(s: CheckContext) -> Finding:
    more: list[FailureSearch] = [pgd(num_steps=200, num_restarts=2), pgd(num_steps=200, loss="margin")]
    breaks, count, number = s.breaks_robust(more)
    evidence = f"PGD-200 with two restarts, and PGD-200 on the margin loss, broke {count}"
    return not breaks, evidence, {"broken": number, "robust": int(s.is_robust.sum())}
