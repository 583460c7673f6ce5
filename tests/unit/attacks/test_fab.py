"""FAB against closed forms: the nearest point of a plane in the box, the distance of a linear model."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from advtrain.attacks.fab import FastAdaptiveBoundary, boundary_move
from advtrain.threat import ThreatModel
from tests.unit.attacks.test_pgd import worst_score
from tests.unit.attacks.test_suites import linear_problem


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_boundary_move_reaches_plane_at_smallest_radius(norm):
    """Oracle: bisection on the radius, with the worst case of a linear function inside ball and box."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.rand(16, 9, generator=generator), torch.randn(16, 9, generator=generator))
    c = 2.0 * torch.randn(16, generator=generator)
    z = x + boundary_move(x, w, c, ThreatModel(norm, 1.0))
    assert z.min() >= 0
    assert z.max() <= 1
    reachable = []
    for row in range(16):
        one = x[row : row + 1]
        pull = w[row] * c[row].sign()

        def gain(eps, one=one, pull=pull):
            return float(highest(pull, one, ThreatModel(norm, eps)) - (pull * one).sum())

        most, low, high = gain(100.0), 0.0, 100.0
        reachable.append(most >= float(c[row].abs()))
        if not reachable[-1]:
            assert torch.allclose((pull * (z[row] - one[0])).sum(), torch.tensor(most), atol=1e-5)
            continue
        assert float((w[row] * (z[row] - one[0])).sum()) == pytest.approx(float(c[row]), abs=1e-5)
        for _ in range(35):
            middle = (low + high) / 2
            low, high = (middle, high) if gain(middle) < float(c[row].abs()) else (low, middle)
        assert float(ThreatModel(norm, 1.0).distance(z[row : row + 1], one)) == pytest.approx(high, abs=1e-4)
    assert 4 < sum(reachable) < 16


@pytest.mark.parametrize("gap", [1e-5, 1e-2, 10.0])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_boundary_move_is_accurate_near_and_far_from_plane(norm, gap):
    """Oracle: the same step in double precision, on images with pixels at the box bounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 784, generator=generator)
    x = torch.where(x < 0.5, 0.0, torch.where(x > 0.9, 1.0, x))
    w = torch.randn(50, 784, generator=generator) * torch.rand(50, 784, generator=generator) ** 4
    c, threat = torch.full((50,), gap), ThreatModel(norm, 0.3)
    exact = boundary_move(x.double(), w.double(), c.double(), threat)
    found = boundary_move(x, w, c, threat)
    assert ((found - exact).abs().amax(1) <= 1e-5 * exact.abs().amax(1)).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-44])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boundary_move_is_fast_and_finite_when_gradient_nearly_vanishes(norm, scale):
    x, w = torch.tensor([[0.2, 0.5, 1.0]]), scale * torch.tensor([[1.0, 2.0, -1.0]])
    started = time.monotonic()
    move = boundary_move(x, w, torch.tensor([scale]), ThreatModel(norm, 1.0))
    assert time.monotonic() - started < 1
    assert move.isfinite().all()
    assert ((x + move >= 0) & (x + move <= 1)).all()


def highest(w, x, threat):
    """Return max w z over ball and box: linf and l2 by `worst_score`, l1 greedily."""
    if threat.norm != "l1":
        return worst_score(w, x, torch.zeros(1), threat)
    room = torch.where(w > 0, 1 - x, x)
    order = w.abs().argsort(descending=True)
    used = room[:, order]
    spent = (threat.eps - (used.cumsum(1) - used)).clamp_min(0).minimum(used)
    return (w * x).sum() + (spent * w.abs()[order]).sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_finds_exact_distance_of_linear_model(norm):
    """Oracle: the step from the clean input to the model's only boundary."""
    model, x, y, _ = linear_problem()
    score = x @ model.weight + model.bias
    threat = ThreatModel(norm, 1.0)
    exact = x + boundary_move(x, model.weight.expand_as(x).detach(), -score.detach(), threat)
    reached = (exact @ model.weight + model.bias).abs() < 1e-5
    _, distance = FastAdaptiveBoundary(num_targets=1).find_nearest(model, x, y, threat)
    assert torch.allclose(distance[reached], threat.distance(exact, x)[reached], rtol=0.02, atol=1e-4)
    assert (distance >= threat.distance(exact, x) - 1e-5)[reached].all()
    assert reached.float().mean() > 0.5


def test_fab_breaks_linear_worst_case_except_at_boundary():
    model, x, y, is_broken = linear_problem()
    threat = ThreatModel("linf", 0.15)
    x_adv, fooled = FastAdaptiveBoundary(num_targets=1).find_failures(model, x, y, threat)
    assert not (fooled & ~is_broken(threat)).any()
    assert (is_broken(ThreatModel("linf", 0.15 / 1.03)) <= fooled).all()
    assert threat.distance(x_adv, x).max() <= 0.15
    assert (model(x_adv).argmax(1) != y)[fooled].all()


def test_fab_is_invariant_to_logit_scale():
    model, x, y, _ = linear_problem()

    class Scaled(nn.Module):
        def forward(self, z):
            return 1e4 * model(z)

    threat = ThreatModel("linf", 1.0)
    distances = [
        FastAdaptiveBoundary(num_targets=1).find_nearest(m, x, y, threat)[1] for m in (model, Scaled())
    ]
    assert torch.allclose(*distances, rtol=0.02)
