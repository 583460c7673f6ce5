"""Attacks of training that regularize the prediction: VAT, and noise without an attack (R3F)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import advtrain
from advtrain.attacks import AttackConfig, build_attack
from advtrain.data import AugmentConfig, Place
from advtrain.errors import UserError
from advtrain.recipe.paths import override
from advtrain.recipe.sections import AdversaryConfig
from advtrain.threat import ThreatModel
from advtrain.training import Session, build_components
from advtrain.training.step import Progress, perturb
from tests.kit import Busy, Linear, digits_data, digits_recipe

FREE = {"low": -float("inf"), "high": float("inf")}


def attack(**values):
    return build_attack(AttackConfig.model_validate(values))


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def test_vat_is_algorithm_1_of_miyato_et_al():
    """Oracle: d = u / ||u||, g = gradient of KL(p(x) || p(x + xi d)), then x + eps g / ||g||, with xi = 0.02 eps."""
    model, x, y = Busy().eval(), torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    u = torch.randn(x.shape, generator=seeded())
    z = (x + 0.02 * 0.5 * u / u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).requires_grad_()
    p, q = model(x).softmax(1).detach(), model(z).softmax(1)
    gradient = torch.autograd.grad((p * (p / q).log()).sum(), z)[0]
    expected = x + 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = attack(name="vat")(model, x, y, ThreatModel("l2", 0.5, **FREE), seeded())
    assert torch.allclose(found, expected.detach(), atol=1e-3)
    assert torch.allclose((found - x).flatten(1).norm(dim=1), torch.tensor(0.5))


@pytest.mark.parametrize("loss", ["kl", "kl_sym"])
def test_vat_of_a_linear_model_moves_along_its_weights(loss):
    """For logits (0, w x + b) each divergence grows along w on the side of the Gaussian direction."""
    model, x = Linear(10), torch.rand(8, 10)
    side = (torch.randn(8, 10, generator=seeded()) @ model.weight.detach()).sign().unsqueeze(1)
    expected = x + 0.3 * side * model.weight.detach() / model.weight.detach().norm()
    y, threat = torch.zeros(8, dtype=torch.long), ThreatModel("l2", 0.3, **FREE)
    found = attack(name="vat", loss=loss)(model, x, y, threat, seeded())
    assert torch.allclose(found, expected, atol=1e-4)


def test_power_iterations_of_vat_find_the_leading_eigenvector_of_the_fisher_matrix():
    """Near x, KL(p(x) || p(x + d)) = d' H d / 2 with H = W' (diag(p) - p p') W for logits W x."""
    layer, x = nn.Linear(2, 3, bias=False), torch.zeros(1, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.9], [0.0, 0.0]])
    p, w = layer(x).softmax(1)[0].detach(), layer.weight.detach()
    _, vectors = torch.linalg.eigh(w.T @ (p.diag() - torch.outer(p, p)) @ w)
    y, threat = torch.zeros(1, dtype=torch.long), ThreatModel("l2", 0.5, **FREE)
    cosines = []
    for steps in (1, 30):
        moved = attack(name="vat", num_steps=steps)(layer, x, y, threat, seeded(5)) - x
        cosines.append(float((moved @ vectors[:, -1]).abs() / 0.5))
    assert cosines[0] < 0.99
    assert cosines[1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_vat_stays_in_ball_and_box(norm):
    model, x, threat = Busy().eval(), torch.rand(6, 1, 8, 8), ThreatModel(norm, 0.7)
    found = attack(name="vat", num_steps=2)(model, x, torch.zeros(6, dtype=torch.long), threat, seeded())
    assert threat.distance(found, x).max() <= 0.7 + 1e-5
    assert threat.distance(found, x).min() > 0.1
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_uniform_noise_fills_the_ball_and_runs_no_pass():
    model, x, calls = Busy(), torch.full((400, 1, 8, 8), 0.5), []
    model.register_forward_hook(lambda *_: calls.append(1))
    y, threat = torch.zeros(400, dtype=torch.long), ThreatModel("linf", 0.2)
    found = build_attack(AttackConfig(name="noise", num_steps=0, start="uniform"), check_inputs=False)(
        model, x, y, threat, seeded()
    )
    moved = (found - x).flatten()
    assert moved.abs().max() <= 0.2
    assert float(moved.std()) == pytest.approx(0.2 / 3**0.5, rel=0.02)  # of U(-0.2, 0.2)
    assert abs(float(moved.mean())) < 0.005
    assert calls == []
    assert model.training


def test_gaussian_noise_has_deviation_eps_of_each_sample_and_stays_in_the_box():
    model, y = Busy(), torch.zeros(400, dtype=torch.long)
    scale = torch.tensor([0.5, 1.0]).repeat(200)
    noise, threat = attack(name="noise", start="gaussian"), ThreatModel("linf", 0.1).with_radius_scale(scale)
    moved = noise(model, torch.full((400, 1, 8, 8), 0.5), y, threat, seeded()) - 0.5
    assert float(moved[::2].std()) == pytest.approx(0.05, rel=0.03)
    assert float(moved[1::2].std()) == pytest.approx(0.1, rel=0.03)
    assert moved.abs().max() > 0.3
    assert noise(model, torch.zeros(400, 1, 8, 8), y, threat, seeded()).min() == 0
    with pytest.raises(UserError, match="needs linf"):
        noise(model, torch.rand(400, 1, 8, 8), y, ThreatModel("l2", 0.1), seeded())


def components(*overrides):
    recipe = digits_recipe(
        "model.name=mlp",
        "optimizer={name: sgd, lr: 0.1}",
        "training.batch_size=40",
        "adversary.num_steps=0",
        "adversary.name=noise",
        "objective={clean_ce: 1, kl_sym: 0.5}",
        *overrides,
    )
    data = digits_data(recipe)
    parts = build_components(recipe, data, Session())
    parts.ddp_objective.train()
    return parts, next(iter(data.train.train_batches(40, 0, 0, AugmentConfig(), Place())))


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_step_of_r3f_is_its_published_loss_in_two_passes(start):
    """Oracle: a step of SGD on l(x) + lambda (KL(p || q) + KL(q || p)), with q = p(x + noise)."""
    ours, batch = components(f"adversary.start={start}")
    noisy = perturb(ours, batch, Progress(0, 0.0))
    other, _ = components()
    p, q = other.network(batch.x).softmax(1), other.network(noisy).softmax(1)
    divergence = (p * (p / q).log() + q * (q / p).log()).sum(1)
    loss = -p[torch.arange(len(batch.y)), batch.y].log() + 0.5 * divergence
    assert divergence.min() > 1e-6
    parameters = list(other.model.parameters())
    steps = torch.autograd.grad(loss.mean(), parameters)
    calls = []
    ours.network.register_forward_hook(lambda *_: calls.append(1))
    ours.train_step(ours, batch, Progress(0, 0.0))
    assert len(calls) == 2
    for found, before, gradient in zip(ours.model.parameters(), parameters, steps, strict=True):
        assert torch.allclose(found, before - 0.1 * gradient, atol=1e-6)


def test_kl_sym_at_radius_zero_is_standard_training():
    trained = []
    for overrides in (("adversary.eps=0",), ("objective={clean_ce: 1}",)):
        parts, batch = components(*overrides)
        parts.train_step(parts, batch, Progress(0, 0.0))
        trained.append(list(parts.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "noise", "num_steps": 1}, "num_steps 0"),
        ({"name": "noise", "start": "none"}, "uniform or gaussian"),
        ({"name": "noise", "loss": "kl"}, "no loss"),
        ({"name": "noise", "step_size": 0.1}, "no step_size"),
        ({"name": "noise", "num_restarts": 2}, "no num_restarts"),
        ({"name": "noise", "batch_norm": "train"}, "stay eval"),
        ({"name": "noise", "start": "gaussian", "norm": "l2"}, "whatever the norm"),
        ({"name": "pgd", "num_steps": 0}, "at least one step"),
        ({"name": "vat", "num_steps": 0}, "at least one step"),
        ({"name": "vat", "start": "uniform"}, "Gaussian direction"),
        ({"name": "vat", "loss": "ce"}, "kl or kl_sym, not ce"),
        ({"name": "vat", "step_size": 0.1}, "no step_size"),
        ({"name": "vat", "friendly": 1}, "no friendly"),
        ({"name": "vat", "momentum": 1.0}, "no momentum"),
    ],
)
def test_settings_that_do_not_suit_vat_or_noise_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdversaryConfig.model_validate({"eps": 0.1} | values)


def test_guard_does_not_watch_noise_which_takes_no_step():
    noise, vat = (AdversaryConfig.model_validate({"eps": 0.1, "name": name}) for name in ("noise", "vat"))
    assert (noise.one_step, vat.one_step) == (False, True)


def test_noise_is_refused_in_an_evaluation():
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UserError, match="noise is for training only"):
        advtrain.attack(Busy().eval(), x, y, "linf:0.1", name="noise")
    with pytest.raises(UserError, match="noise is for training only"):
        digits_recipe("evaluation.attack={name: noise}")


def test_another_attack_keeps_the_loss_unless_a_preset_filled_it_in():
    values = digits_recipe("adversary.loss=kl").values()
    override(values, {"adversary.name": "fgsm_rs"})
    assert values["adversary"]["loss"] == "kl"
    override(values, {"adversary.name": "vat"})
    assert AdversaryConfig.model_validate(values["adversary"]).loss == "kl"
    override(values, {"adversary.name": "pgd"})
    assert AdversaryConfig.model_validate(values["adversary"]).loss == "ce"
