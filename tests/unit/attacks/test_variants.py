"""The published variants against their papers' algorithms, written out; losses against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advtrain.attacks import ATTACK_LOSSES, AttackConfig, build_attack
from advtrain.attacks.losses import margin
from advtrain.threat import ThreatModel
from tests.kit import Busy, Linear
from tests.unit.attacks.test_pgd import worst_score


def attack(**values):
    return build_attack(AttackConfig.model_validate(values))


def batch(n=6):
    return torch.rand(n, 1, 8, 8), torch.randint(0, 10, (n,))


def gradient_at(model, z, y):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0]


def test_n_fgsm_matches_paper_without_projection_to_ball():
    """Oracle: de Jorge et al. 2022, eq. 6, clipped to the box."""
    model, (x, y) = Busy().eval(), batch()
    noise = 2 * 0.2 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) - 1)
    start = (x + noise).clamp(0, 1)
    expected = (start + 0.2 * gradient_at(model, start, y).sign()).clamp(0, 1)
    got = attack(name="n_fgsm")(model, x, y, ThreatModel("linf", 0.2), torch.Generator().manual_seed(7))
    assert torch.allclose(got, expected, atol=1e-6)
    assert float((got - x).abs().max()) > 0.4


def test_mi_fgsm_follows_sum_of_normalized_gradients():
    """Oracle: Dong et al. 2018, algorithm 1, 4 steps of eps / 4, mu = 0.8."""
    model, (x, y) = Busy().eval(), batch()
    z, g = x, torch.zeros_like(x)
    for _ in range(4):
        gradient = gradient_at(model, z, y)
        g = 0.8 * g + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        z = (z + 0.3 / 4 * g.sign()).clamp(0, 1)
    got = attack(name="mi_fgsm", num_steps=4, momentum=0.8)(model, x, y, ThreatModel("linf", 0.3))
    assert torch.allclose(got, z, atol=1e-6)


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_friendly_attack_stops_tau_steps_after_sample_is_broken(tau):
    """Oracle: Zhang et al. 2020, algorithm 1, one sample at a time."""
    model, (x, y), threat = Busy().eval(), batch(20), ThreatModel("linf", 0.3)
    y[:10] = model(x[:10]).argmax(1)  # half of them are classified correctly at the start
    expected = []
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        z, left = xi, tau
        for _ in range(8):
            if model(z).argmax(1) != yi:
                if left == 0:
                    break
                left -= 1
            z = threat.project(z + 0.05 * gradient_at(model, z, yi).sign(), xi)
        expected.append(z)
    friendly = attack(num_steps=8, step_size=0.05, start="none", friendly=tau)
    assert torch.allclose(friendly(model, x, y, threat), torch.cat(expected), atol=1e-5)


def test_friendly_attack_runs_forward_on_active_samples_only():
    model, (x, y), rows = Busy().eval(), batch(12), []
    y[:6] = model(x[:6]).argmax(1)
    model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    attack(num_steps=10, friendly=0)(model, x, y, ThreatModel("linf", 0.3))
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 12


def test_targeted_attack_increases_target_probability():
    model, (x, y), threat = Busy().eval(), batch(40), ThreatModel("linf", 0.5)
    least = model(x).scatter(1, y.unsqueeze(1), float("inf")).argmin(1)
    assert (least != y).all()
    x_adv = attack(num_steps=20, target="least_likely")(model, x, y, threat)
    before, after = (model(z).softmax(1).gather(1, least.unsqueeze(1)) for z in (x, x_adv))
    assert (after > before).float().mean() > 0.95
    away = attack(num_steps=20)(model, x, y, threat)
    assert (after > model(away).softmax(1).gather(1, least.unsqueeze(1))).float().mean() > 0.95


def test_random_targets_exclude_label():
    """A linear model of two classes has only one wrong class, so a targeted step equals an untargeted one."""
    model, x, y = Linear(12), torch.rand(50, 12), torch.randint(0, 2, (50,))
    threat = ThreatModel("linf", 0.1)
    x_adv = attack(num_steps=20, target="random")(model, x, y, threat)
    assert torch.allclose(x_adv @ model.weight, worst_score(model.weight, x, y, threat), atol=1e-6)


@pytest.mark.parametrize("eps", [0.05, 0.5, 2.0])
def test_pgd_reaches_the_linear_worst_case_l1(eps):
    """Oracle: the coordinates in order of |w|, each moved to its bound until eps is used up."""
    model, x, y = Linear(12), torch.rand(30, 12), torch.randint(0, 2, (30,))
    away = torch.where(y == 1, -1.0, 1.0).unsqueeze(1) * model.weight
    room = torch.where(away > 0, 1 - x, x)
    order = away.abs().argsort(dim=1, descending=True)
    used = room.gather(1, order)
    spent = (eps - (used.cumsum(1) - used)).clamp_min(0).minimum(used)
    gain = (spent * away.abs().gather(1, order)).sum(1)
    x_adv = attack(num_steps=600, step_size=eps / 100)(model, x, y, ThreatModel("l1", eps))
    assert torch.allclose(((x_adv - x) * away).sum(1), gain, atol=1e-2 * eps)


def test_attack_respects_radius_of_each_sample():
    model, (x, y) = Busy(), batch(5)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for norm in ("linf", "l2", "l1"):
        threat = ThreatModel(norm, 0.4).with_radius_scale(shares)
        for values in ({"num_steps": 20}, {"num_steps": 20, "friendly": 50}, {"name": "fgsm"}):
            x_adv = attack(**values)(model, x, y, threat, torch.Generator().manual_seed(0))
            distance = threat.distance(x_adv, x)
            assert (distance <= 0.4 * shares + 1e-6).all()
            assert distance[0] == 0
            assert (distance[1:] > 0.02).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_find_failures_respects_radius_of_each_sample_in_batches(norm):
    model, (x, y), shares = Busy(), batch(20), torch.linspace(0, 1, 20)
    threat = ThreatModel(norm, 0.4).with_radius_scale(shares)
    x_adv, fooled = attack(num_steps=5).find_failures(model, x, y, threat, batch_size=7)
    assert (threat.distance(x_adv, x) <= 0.4 * shares + 1e-6).all()
    assert fooled.any()


def test_margin_is_best_wrong_logit_minus_label_logit():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [-1.0, 4.0]


def test_linearity_loss_is_second_order_remainder():
    """Oracle: for l(z) = z^T A z the remainder of the linear expansion at x is d^T A d."""

    class Quadratic(nn.Module):
        def forward(self, x):
            a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
            value = torch.einsum("ni,ij,nj->n", x, a, x)  # cross-entropy of class 1 against 0: log(1 + e^-s)
            return torch.stack([value.expm1().log(), torch.zeros_like(value)], 1)

    model, x, d = Quadratic(), torch.rand(6, 2) + 1, torch.randn(6, 2) / 10
    climb = ATTACK_LOSSES["linearity"](model, x, torch.ones(6, dtype=torch.long))  # l = log(e^value) = value
    expected = torch.einsum("ni,ij,nj->n", d, torch.tensor([[2.0, 1.0], [1.0, 3.0]]), d).abs()
    assert torch.allclose(climb(model(x + d), x + d), expected, atol=1e-4)


class Line(nn.Module):
    """Linear regression f(x) = w . x + b, whose worst case has a closed form."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 0.5, 1.0]))

    def forward(self, x):
        return (x @ self.w + 0.3).unsqueeze(1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_regression_attack_reaches_dual_norm_away_from_box_bounds(norm, dual, loss):
    """Oracle: |r| + eps ||w||_q away from the box bounds (Xu, Caramanis & Mannor 2010)."""
    model, x, y = Line(), 0.4 + 0.2 * torch.rand(40, 4), 10 * torch.randn(40)
    threat = ThreatModel(norm, 0.1)
    climb = attack(num_steps=30, step_size=0.1, loss=loss)
    x_adv = climb(model, x, y, threat, torch.Generator().manual_seed(0))
    expected = (model(x).squeeze(1) - y).abs() + 0.1 * model.w.norm(p=dual)
    assert torch.allclose((model(x_adv).squeeze(1) - y).abs(), expected, atol=1e-4)
    _, worst = climb.find_worst(model, x, y, threat, torch.Generator().manual_seed(0))
    assert torch.allclose(worst, expected, atol=1e-4)
