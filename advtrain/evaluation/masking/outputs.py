"""Checks of the outputs and gradients that attacks rely on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from advtrain.attacks import attack_mode, build_suite, predictions
from advtrain.attacks.losses import build_cross_entropy, build_margin, margin
from advtrain.evaluation.masking.context import (
    ROUNDING,
    ROUNDING_16_BIT,
    Answer,
    CheckContext,
    Finding,
    check,
    spread,
)

#: Largest accepted share of samples with a gradient, or an output change, of exactly zero.
ZERO_SHARE = 0.1
#: Largest accepted share of samples whose gradient does not foretell the change of the margin, and the accepted range
#: of change / prediction.
WRONG_SHARE, FORETOLD = 0.1, (0.5, 2.0)
#: Distances along the sign of the gradient at which the change is measured.
DISTANCES = (1e-3, 1e-2)
#: Largest accepted squared difference of the means of first and second draws, in multiples of its expectation.
DRAWS_RATIO = 10
#: Largest accepted gap of the two best scores where the decision flips, as a share of the median lead.
BOUNDARY_GAP = 0.1
#: The same at nine tenths of the way to the boundary, as a share of the lead at the image.
BEFORE_BOUNDARY = 0.8


class _Rescaled(nn.Module):
    """Model with logits divided by their std.

    The predictions are the same, and the cross-entropy does not saturate.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x) / self.scale
        return out


@check(
    "Do loss gradients reach the input, and if some vanish, do rescaled logits give the same result?",
    "the loss is flat, but the decision is not: evaluate with scale-invariant attacks (apgd-dlr, apgd-t, "
    "square), or remove the layer that blocks the gradient",
)
def _gradients(s: CheckContext) -> Finding:
    rescaled = _Rescaled(s.model, spread(s.outputs(s.x)))
    shares = []
    for model in (s.model, rescaled):
        size = s.gradients(s.x, build_cross_entropy, model).flatten(1).abs().amax(1)
        shares.append(float((size == 0).float().mean()))
    evidence = f"the gradient is exactly 0 on {100 * shares[0]:.0f} % of {len(s)} samples"
    if shares[0] == 0:
        return True, evidence, {"zero_share": 0.0}
    breaks, count, _ = s.breaks_robust(build_suite("apgd-ce"), model=rescaled)
    evidence += f", on {100 * shares[1]:.0f} % with rescaled logits; on these, apgd-ce broke {count}"
    return not breaks and shares[1] <= ZERO_SHARE, evidence, {"zero_share": shares[0]}


@check(
    "Does the gradient of the margin foretell how the margin changes?",
    "the gradient is made up, so gradient attacks walk in a wrong direction: evaluate with gradient-free attacks "
    "(square, rays), or with a differentiable approximation (BPDA)",
    stochastic="mean",
    inputs_alone=True,
)
def _slope(s: CheckContext) -> Finding:
    model, furthest = s.repeatable(), max(DISTANCES) * (s.threat.high - s.threat.low)
    points = s.x.clone()
    points[1::3] = s.threat.random_start(s.x, s.generator)[1::3]
    points[2::3] = s.endpoints(len(s))[2::3]
    x = points.clamp(s.threat.low + furthest, s.threat.high - furthest)
    gradient = s.gradients(x, build_margin, model)
    slope = gradient.flatten(1).abs().sum(1)  # change of the margin per unit along sign(gradient)
    fine = torch.zeros_like(slope, dtype=torch.bool)
    for distance in DISTANCES:
        move = distance * (s.threat.high - s.threat.low)
        ends = [
            margin(s.outputs(x + way * move * gradient.sign(), model), s.y) / (2 * move) for way in (1, -1)
        ]
        change = ends[0] - ends[1]
        fine |= (change >= FORETOLD[0] * slope) & (change <= FORETOLD[1] * slope)  # 0 and 0 agree
    wrong = 1 - float(fine.float().mean())
    evidence = f"it foretells the change along its sign on {100 * (1 - wrong):.0f} % of {len(s)} samples"
    return wrong <= WRONG_SHARE, evidence, {"foretold": 1 - wrong}


@check(
    "Do the two best scores meet where the decision flips?",
    "the scores do not say how near another decision is, so attacks on scores cannot climb: evaluate with attacks "
    "that see only the predicted class (rays, student)",
    stochastic="mean",
    inputs_alone=True,
)
def _boundary(s: CheckContext) -> Finding:
    model = s.repeatable()
    other = s.x.roll(1, 0)
    logits, others = s.outputs(s.x, model), s.outputs(other, model)
    start, end = predictions(logits), predictions(others)
    pairs = (start != end).nonzero().flatten()
    if len(pairs) == 0:
        return True, "no two samples next to each other have different classes"
    near, far, start = s.x[pairs], other[pairs], start[pairs]
    low, high = (
        torch.full((len(pairs),), value, dtype=torch.float64, device=near.device) for value in (0, 1)
    )

    def between(share: Tensor) -> Tensor:
        """Return the scores of the points at `share` (n,) of the way."""
        at = share.view(-1, *[1] * (near.dim() - 1))
        return s.outputs((near + at * (far.double() - near.double())).float(), model)

    for _ in range(30):
        middle = (low + high) / 2
        same = predictions(between(middle)) == start
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    gap = torch.stack([_lead(between(side)) for side in (low, high)]).amax(0)
    tiny = torch.finfo(gap.dtype).tiny
    share = gap / _lead(logits).median().clamp_min(tiny)
    largest_gap = float(share.quantile(0.9))
    just_before = float((_lead(between(0.9 * low)) / _lead(logits[pairs]).clamp_min(tiny)).median())
    evidence = (
        f"between {len(pairs)} pairs of images, the two best scores differ there by {largest_gap:.2g} times the median "
        f"lead (90 % quantile), and at nine tenths of the way by {just_before:.2g} times the lead at the image (median)"
    )
    data = {"gap": largest_gap, "just_before": just_before}
    return largest_gap <= BOUNDARY_GAP and just_before <= BEFORE_BOUNDARY, evidence, data


def _lead(logits: Tensor) -> Tensor:
    """Return the best score minus the second best, (N,)."""
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


@check(
    "Are two outputs for the same input equal?",
    "the outputs are random, which misleads attacks that use single draws: evaluate with --suite rand, which "
    "averages over draws",
)
def _stochastic(s: CheckContext) -> Finding:
    evidence = f"two passes over the same input differ by at most {s.noise:.2g} times the logits' std"
    if s.num_draws > 1 and s.is_stochastic:
        alike, more = _first_draws(s)
        return alike, f"{evidence}; the suite averages over draws; {more}", {"averages_over_draws": True}
    return not s.is_stochastic, evidence, {"noise": s.noise}


def _first_draws(s: CheckContext) -> tuple[bool, str]:
    """Return whether a first and a second draw for an input have the same mean, and how far these differ."""
    first, second = [], []
    for _ in range(5):
        s.outputs(s.x.roll(1, 0))
        first.append(s.outputs(s.x))
        second.append(s.outputs(s.x))
    one, two = torch.stack(first), torch.stack(second)
    noise = (one.var(0) + two.var(0)).mean() / len(first)
    ratio = float(
        (one.mean(0) - two.mean(0)).square().mean() / noise.clamp_min(torch.finfo(noise.dtype).tiny)
    )
    return ratio <= DRAWS_RATIO, f"first and second draws differ by {ratio:.2g} times what noise explains"


@check(
    "Does the output for a sample depend only on that sample?",
    "outputs depend on the other samples in the batch, for example through batch statistics: save the model in "
    "evaluation mode, or replace the layer",
)
def _batch(s: CheckContext) -> Finding:
    points = torch.cat([s.x[:8], s.threat.rows(slice(8)).random_start(s.x[:8], s.generator), s.endpoints(8)])
    together = s.outputs(torch.cat([points, s.x]))[: len(points)]
    with attack_mode(s.model), torch.no_grad():
        alone = torch.cat([s.model(point[None]).float() for point in points])
        again = torch.cat([s.model(point[None]).float() for point in points])
    scale = spread(together)
    noise = float((alone - again).abs().max()) / scale  # randomness is for the check `stochastic`
    change = float((together - alone).abs().max()) / scale
    evidence = f"outputs at and beside images alone and in a batch differ by {change:.2g}"
    allowed = max(ROUNDING_16_BIT if _is_16_bit(s) else ROUNDING, 3 * noise)
    return change <= allowed, f"{evidence} times the logits' std", {"change": change}


def _is_16_bit(s: CheckContext) -> bool:
    """Return whether all logits are numbers of 16 bit."""
    logits = s.outputs(s.x)
    return any(torch.equal(logits, logits.to(kind).float()) for kind in (torch.bfloat16, torch.float16))


@check(
    "Does the output change if the input changes very little?",
    "the model rounds its input or output, so its gradients are zero or artificial: evaluate with gradient-free "
    "attacks (square, rays), or with a differentiable approximation (BPDA)",
)
def _steps_inside(s: CheckContext) -> Finding:
    # 1e-4 is too small to move an 8-bit gray level to another step of a quantizer with steps of 1/255 or more.
    same = _unchanged(s, replace(s.threat, norm="linf", eps=1e-4).random_start(s.x, s.generator))
    evidence = f"noise of 1e-4 leaves all outputs exactly unchanged on {100 * same:.0f} % of {len(s)} samples"
    if same <= ZERO_SHARE:
        return True, evidence, {"unchanged": same}
    if _is_16_bit(s):
        noise = replace(s.threat, norm="linf", eps=1 / 255).random_start(s.x, s.generator)
        verdict: Answer = "warning" if _unchanged(s, noise) <= ZERO_SHARE else False
        return verdict, f"{evidence}; the logits have 16 bit", {"unchanged": same}
    # About one element moves by 1/255, which changes the output of an 8-bit quantizer, but rarely of a coarser one.
    some = torch.rand(s.x.shape, generator=s.generator, device=s.x.device) < 1 / s.x[0].numel()
    way = 1 / 255 - (s.x > 0.5) * 2 / 255
    single = _unchanged(s, s.x + some * way, among=some.flatten(1).any(1))
    evidence += f"; one element moved by 1/255 on {100 * single:.0f} %"
    data = {"unchanged": same, "unchanged_by_one_element": single}
    return ("warning", f"{evidence}: it rounds to 8 bit", data) if single <= 0.5 else (False, evidence, data)


def _unchanged(s: CheckContext, moved: Tensor, among: Tensor | None = None) -> float:
    """Return the share of samples whose outputs are equal at `moved` (N, ...)."""
    same = (s.outputs(s.x) == s.outputs(moved)).all(1)
    return float((same if among is None else same[among]).float().mean().nan_to_num(nan=1.0))


@check(
    "Is the output just beside an image like that at the image, and the same when gradients are recorded?",
    "the model recognizes the images themselves, or the attack: its answer at the images says nothing about the points "
    "around them",
)
def _beside(s: CheckContext) -> Finding:
    at = s.outputs(s.x)
    noise = torch.randn(s.x.shape, generator=s.generator, device=s.x.device, dtype=s.x.dtype)
    moved = s.threat.where_free(s.x + 1e-5 * noise, s.x).clamp(s.threat.low, s.threat.high)
    scale, allowed = spread(at), max(ROUNDING_16_BIT, 3 * s.noise)
    change = float((s.outputs(moved) - at).abs().amax(1).median()) / scale
    with attack_mode(s.model), torch.enable_grad():
        recorded = torch.cat(
            [
                s.model(part.requires_grad_()).detach().float()
                for part in torch.split(s.x.clone(), s.batch_size)
            ]
        )
    gap = float((recorded - at).abs().max()) / scale
    evidence = (
        f"outputs 1e-5 beside the images differ by {change:.2g} times the logits' std (median), with a "
        f"gradient by {gap:.2g} (largest)"
    )
    return change <= allowed and gap <= allowed, evidence, {"beside": change, "recorded": gap}


@check(
    "Does the forward pass compute no gradients of its own?",
    "the model attacks or purifies its input in the forward pass, and gradient attacks do not see through it: evaluate "
    "with gradient-free attacks on means, or with an attack made for this defence (Croce et al. 2022, "
    "arXiv 2202.13711)",
)
def _own_gradients(s: CheckContext) -> Finding:
    recorded: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        recorded.append(1)
        return tensor

    failure = ""
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with attack_mode(s.model), torch.no_grad(), hooks:
        try:
            s.model(s.x[: s.batch_size])
        except RuntimeError as error:  # torch.func refuses these hooks
            failure = str(error)
    if failure:
        return False, f"a forward pass that records nothing fails: {failure.splitlines()[0]}"
    evidence = f"a forward pass without gradients recorded {len(recorded)} tensors for a backward pass"
    return not recorded, evidence, {"recorded": len(recorded)}


@check(
    "Does the threat model apply to the inputs themselves?",
    "also report the accuracy under changes of the input",
)
def _embedding(s: CheckContext) -> Finding | None:
    if not s.embeds:
        return None
    return "warning", "the attacks perturbed embed(x), so the result does not cover changes of the input"
