"""Checks with inputs that the model was never asked, for memories and known test sets."""

from __future__ import annotations

import torch
from torch import Tensor

from advtrain.attacks import StudentTransfer, build_suite, predictions
from advtrain.attacks.draws import MeanOfDraws
from advtrain.attacks.student import teach
from advtrain.data import Place, Split
from advtrain.evaluation.masking.context import ROUNDING, Answer, CheckContext, Finding, check, spread
from advtrain.evaluation.statistics import surely_above
from advtrain.models.network import from_perturbed

#: On other images the accuracy under attack must not be surely below these shares of that on the evaluated images.
WARN_BELOW, FAIL_BELOW = 0.8, 0.5
#: A pixel is a large part of a narrower image.
LEAST_WIDTH = 16


@check(
    "Does a copy of the model that was not asked before give the same scores?",
    "the model remembers its queries, so an attack never sees what a new input would give: remove the memory",
)
def _fresh_copy(s: CheckContext) -> Finding:
    copies = [copy for copy in (s.evaluator.fresh() for _ in range(3)) if copy is not None]
    if len(copies) < 3:
        return False, "the model cannot be copied, so it cannot be compared with a copy"
    endpoints = s.endpoints(len(s))  # the model was asked the whole way to these
    models = [*map(from_perturbed, copies), s.model]
    if s.is_stochastic:  # the same draws for all
        models = [MeanOfDraws(model, max(5, s.num_draws), seed=0) for model in models]
    first, second, third, asked = models
    mixed = (s.x + s.x.roll(1, 0)) / 2  # inputs that nobody asked, far from the images
    beside, beside_mixed = (s.threat.random_start(centre, s.generator) for centre in (s.x, mixed))
    changes, noise = [], 0.0
    for points, model, fresh, before in (
        (beside, asked, first, s.x),
        (beside_mixed, second, first, mixed),
        (endpoints, asked, third, s.x),
    ):
        expected = s.outputs(points, fresh)
        noise = max(noise, float((s.outputs(points, fresh) - expected).abs().max()) / spread(expected))
        s.outputs(before, model)
        changes.append(float((s.outputs(points, model) - expected).abs().max()) / spread(expected))
    shown = ", ".join(f"{change:.2g}" for change in changes)
    evidence = (
        "scores beside the images, beside mixed images and after PGD-10 differ from those of copies that were not "
        f"asked before by {shown} times the logits' std"
    )
    data = dict(zip(("beside", "beside_mixed", "after_attack"), changes, strict=True))
    return max(changes) <= max(ROUNDING, 3 * noise), evidence, data


@check(
    "Is the accuracy under attack the same on other images?",
    "the model knows the evaluated images, or remembers its queries: evaluate images that were held back, with "
    "--other DATA",
    stochastic="mean",
    inputs_alone=True,
)
def _other_images(s: CheckContext) -> Finding:
    if s.evaluator.other is not None:
        name, (first, second) = "held-back images", _held_back(s, s.evaluator.other)
    elif s.x.dim() == 4 and s.x.shape[3] >= LEAST_WIDTH:
        name, first, second = "images moved by a pixel", (_moved(s.x, 1), s.y), (_moved(s.x, -1), s.y)
    else:
        return (
            "skipped",
            "it needs --other DATA: these inputs are no images, or too small to be moved by a pixel",
        )
    # Answers to transferred inputs, asked before anything near them: a memory has no answer ready.
    student, transfer = teach(s.model, s.x, s.threat, s.generator, batch_size=s.batch_size), StudentTransfer()
    there = _correct_under_transfer(s, transfer, student, *first)
    right = _correct(s, *second)
    here = _correct_under_transfer(s, transfer, student, s.x, s.y)
    expected = float(here.float().mean() * right.float().mean())
    # The same attack on the images and on other images, on those that are classified correctly.
    attacks = build_suite("apgd-ce-30,pgd-20" if s.num_draws == 1 else "eot-apgd-ce-10x5")
    stands = float((~s.broken(attacks)).float().mean())
    others = s.broken(attacks, x=second[0][right], y=second[1][right])
    pairs = ((there, expected), (~others, stands))
    evidence = (
        f"on {name}, {int(there.sum())} of {len(there)} are correct under transfer where {100 * expected:.0f} % are "
        f"expected, and {int((~others).sum())} of {len(others)} under attack where {100 * stands:.0f} % are"
    )
    verdict: Answer = True
    if any(_surely_below(flags, WARN_BELOW * share) for flags, share in pairs):
        verdict = "warning"
    if any(_surely_below(flags, FAIL_BELOW * share) for flags, share in pairs):
        verdict = False
    data: dict[str, float] = {"expected_under_transfer": expected, "expected_under_attack": stands}
    for kind, flags in (("under_transfer", there), ("under_attack", ~others)):
        data[kind] = float(flags.float().mean())
    return verdict, evidence, data


def _held_back(s: CheckContext, other: Split) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return two halves of held-back inputs and labels."""
    (batch,) = other.batches(len(other), Place(device=s.evaluator.device))
    half = len(batch.y) // 2
    return (batch.x[:half], batch.y[:half]), (batch.x[half:], batch.y[half:])


def _moved(x: Tensor, by: int) -> Tensor:
    """Return images (N, C, H, W) moved sideways; the column at the border is repeated."""
    columns = (torch.arange(x.shape[3], device=x.device) - by).clamp(0, x.shape[3] - 1)
    return x[..., columns]


def _correct(s: CheckContext, x: Tensor, y: Tensor) -> Tensor:
    return predictions(s.outputs(x)) == y


def _correct_under_transfer(
    s: CheckContext, transfer: StudentTransfer, student: torch.nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    """Return which samples are correct on every transferred input, (N,) bool."""
    found = transfer.candidates(student, x, y, s.threat, s.generator, s.batch_size)
    return torch.stack([_correct(s, candidate, y) for candidate in found]).all(0)


def _surely_below(flags: Tensor, share: float) -> bool:
    """Return whether the share of true flags (N,) is surely below `share`."""
    return surely_above(int((~flags).sum()), len(flags), 1 - share)
