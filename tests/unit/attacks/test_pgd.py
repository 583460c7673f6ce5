"""Gradient attacks against closed forms, and the state that they must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advtrain.attacks import ATTACK_LOSSES, AttackConfig, attack_mode, build_attack, input_gradient
from advtrain.attacks.losses import cross_entropy, kl_divergence
from advtrain.errors import UserError
from advtrain.threat import ThreatModel
from tests.kit import Busy, Linear


def attack(**values):
    return build_attack(AttackConfig.model_validate(values))


def worst_score(weight, x, y, threat):
    """Return the score w x at the worst point of ball and box of a linear model, in closed form."""
    away = torch.where(y == 1, -1.0, 1.0).unsqueeze(1) * weight  # the direction of the worst case
    if threat.norm == "linf":
        return (x + threat.eps * away.sign()).clamp(0, 1) @ weight
    if threat.norm == "l1":  # the largest weights first, each up to its bound
        delta, left = torch.zeros_like(x), torch.full((len(x),), threat.eps)
        for i in weight.abs().argsort(descending=True).tolist():
            room = torch.where(away[:, i] > 0, 1 - x[:, i], x[:, i])
            delta[:, i] = torch.minimum(room, left) * away[:, i].sign()
            left = left - delta[:, i].abs()
        return (x + delta) @ weight
    # l2: delta_i = clip(s w_i) with the largest s in the ball; bisection on s.
    low, high = torch.zeros(len(x), 1), torch.full((len(x), 1), 1e4)
    for _ in range(200):
        s = (low + high) / 2
        fits = ((x + s * away).clamp(0, 1) - x).norm(dim=1, keepdim=True) <= threat.eps
        low, high = torch.where(fits, s, low), torch.where(fits, high, s)
    return (x + low * away).clamp(0, 1) @ weight


@pytest.mark.parametrize("start", ["uniform", "none"])
@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.1), ThreatModel("linf", 0.6)], ids=str)
def test_pgd_reaches_the_linear_worst_case_exactly_linf(threat, start):
    model, x, y = Linear(12), torch.rand(50, 12), torch.randint(0, 2, (50,))
    x_adv = attack(num_steps=20, start=start)(model, x, y, threat)
    assert torch.allclose(x_adv @ model.weight, worst_score(model.weight, x, y, threat), atol=1e-6)


@pytest.mark.parametrize("eps", [0.05, 0.5, 1.5])
def test_pgd_reaches_the_linear_worst_case_l2(eps):
    threat = ThreatModel("l2", eps)
    model, x, y = Linear(12), torch.rand(50, 12), torch.randint(0, 2, (50,))
    x_adv = attack(num_steps=50, step_size=eps)(model, x, y, threat, torch.Generator().manual_seed(0))
    assert torch.allclose(x_adv @ model.weight, worst_score(model.weight, x, y, threat), atol=2e-4)


def test_pgd_l2_reaches_closed_form_away_from_box_bounds():
    """Away from the box bounds the worst case is x +- eps w / ||w||."""
    threat = ThreatModel("l2", 0.1)
    model, x, y = Linear(12), 0.4 + 0.2 * torch.rand(50, 12), torch.ones(50, dtype=torch.long)
    x_adv = attack(num_steps=10, start="none")(model, x, y, threat)
    assert torch.allclose(x_adv, x - 0.1 * model.weight / model.weight.norm(), atol=1e-6)


def test_fgsm_is_one_signed_step_from_the_clean_input():
    model = Busy().eval()
    x, y = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    gradient = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y, reduction="sum"), x)[0]
    expected = (x + 0.1 * gradient.sign()).clamp(0, 1).detach()
    assert torch.allclose(attack(name="fgsm")(model, x, y, ThreatModel("linf", 0.1)), expected, atol=1e-6)


def test_fgsm_rs_is_one_step_of_1_25_eps_from_a_uniform_start_projected():
    """Oracle: Wong et al. 2020, algorithm 3, written out."""
    model, threat = Busy().eval(), ThreatModel("linf", 0.2)
    x, y = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    start = (x + 0.2 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) - 1)).clamp(0, 1)
    start.requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)[0]
    delta = (start - x + 1.25 * 0.2 * gradient.sign()).clamp(-0.2, 0.2)
    expected = (x + delta).clamp(0, 1).detach()
    got = attack(name="fgsm_rs")(model, x, y, threat, torch.Generator().manual_seed(7))
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "values",
    [
        {"name": "fgsm"},
        {"name": "fgsm_rs"},
        {"num_steps": 5},
        {"num_steps": 5, "num_restarts": 3},
        {"num_steps": 3, "loss": "kl", "start": "gaussian"},
        {"num_steps": 3, "loss": "linearity"},
        {"num_steps": 3, "loss": "margin", "target": "random"},
        {"num_steps": 3, "target": "least_likely", "friendly": 1},
        {"num_steps": 5, "friendly": 0, "momentum": 0.5},
        {"name": "mi_fgsm"},
    ],
    ids=str,
)
def test_adversarial_inputs_stay_in_ball_and_box(values, norm):
    threat = ThreatModel(norm, 0.3)
    x, y = torch.rand(9, 1, 8, 8), torch.randint(0, 10, (9,))
    x_adv = attack(**values)(Busy(), x, y, threat, torch.Generator().manual_seed(0))
    assert threat.distance(x_adv, x).max() <= 0.3 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_attack_does_not_change_model_or_rng_state(batch_norm, fails):
    model = Busy().train()
    model.body[3].eval()  # in another mode than the rest of the model
    F.cross_entropy(model(torch.rand(4, 1, 8, 8)), torch.arange(4)).backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    asks = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    tracking = model.body[1].track_running_stats
    rng = torch.get_rng_state()
    x, y = torch.rand(4, 1, 8, 8, generator=torch.Generator()), torch.arange(4)
    run = build_attack(AttackConfig.model_validate({"num_steps": 3}), batch_norm)
    if fails:
        with pytest.raises(UserError, match="label 103"):
            run(model, x, y + 100, ThreatModel("linf", 0.1), torch.Generator())
    else:
        run(model, x, y, ThreatModel("linf", 0.1), torch.Generator())
    for name, p in model.named_parameters():
        assert p.requires_grad == asks[name]
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert model.body[1].track_running_stats == tracking
    assert torch.equal(rng, torch.get_rng_state())


def test_batch_norm_mode_selects_statistics_used_by_attack():
    model = Busy().train()
    x = torch.rand(8, 1, 8, 8)
    with attack_mode(model, "eval"):
        running = model(x)
    assert torch.equal(running, model.eval()(x))
    model.train()
    with attack_mode(model, "train"):
        own = model(x)
    normed = nn.functional.batch_norm(
        model.body[0](x), None, None, model.body[1].weight, model.body[1].bias, True
    )
    assert torch.allclose(own, model.body[5](normed.relu().flatten(1)), atol=1e-5)


def test_kl_attack_increases_divergence_and_ignores_label():
    model, x = Busy(), torch.rand(16, 1, 8, 8)
    run = attack(num_steps=10, loss="kl", start="gaussian")
    first = run(
        model,
        x,
        torch.zeros(16, dtype=torch.long),
        ThreatModel("linf", 0.2),
        torch.Generator().manual_seed(0),
    )
    other = run(
        model, x, torch.ones(16, dtype=torch.long), ThreatModel("linf", 0.2), torch.Generator().manual_seed(0)
    )
    assert torch.equal(first, other)
    model.eval()
    clean = model(x).log_softmax(1)
    noise = ThreatModel("linf", 0.2).random_start(x, torch.Generator().manual_seed(1))
    assert (kl_divergence(clean, model(first)) > kl_divergence(clean, model(noise))).float().mean() > 0.9


def test_kl_sym_attack_follows_the_gradient_of_both_divergences():
    """Oracle: sign of the gradient of KL(p || q) + KL(q || p) in probabilities, at the start of the attack."""
    model, x, y = Busy().eval(), torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    run, threat = attack(name="fgsm_rs", loss="kl_sym", step_size=0.3), ThreatModel("linf", 0.2)
    z = threat.random_start(x, torch.Generator().manual_seed(2)).requires_grad_()
    p, q = model(x).softmax(1).detach(), model(z).softmax(1)
    loss = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
    gradient = torch.autograd.grad(loss, z)[0]
    expected = torch.minimum(torch.maximum(z + 0.3 * gradient.sign(), x - 0.2), x + 0.2).clamp(0, 1)
    found = run(model, x, y, threat, torch.Generator().manual_seed(2))
    assert torch.allclose(found, expected.detach(), atol=1e-6)


def test_restarts_never_reduce_loss_of_a_sample():
    model, x, y, threat = (
        Busy().eval(),
        torch.rand(16, 1, 8, 8),
        torch.randint(0, 10, (16,)),
        ThreatModel("linf", 0.3),
    )
    one = attack(num_steps=2)(model, x, y, threat, torch.Generator().manual_seed(0))
    many = attack(num_steps=2, num_restarts=5)(model, x, y, threat, torch.Generator().manual_seed(0))
    assert (cross_entropy(model(many), y) >= cross_entropy(model(one), y)).all()


def test_find_failures_keeps_adversarial_intermediate_iterate():
    """The last iterate may be classified correctly again. The iterate that broke the sample is returned."""
    model, threat = Busy().eval(), ThreatModel("linf", 0.5)
    x = torch.rand(64, 1, 8, 8)
    y = model(x).argmax(1)
    x_adv, fooled = attack(num_steps=30)(model, x, y, threat), None
    x_found, fooled = attack(num_steps=30).find_failures(
        model, x, y, threat, torch.Generator().manual_seed(0)
    )
    assert fooled.any()
    assert (model(x_found).argmax(1) != y)[fooled].all()
    assert (model(x_adv).argmax(1) != y).sum() <= fooled.sum() + 3


def test_input_gradient_is_not_averaged_over_batch():
    model, x, y = Linear(5), torch.rand(7, 5), torch.randint(0, 2, (7,))
    climb = ATTACK_LOSSES["ce"](model, x, y)
    together, _ = input_gradient(model, x, climb)
    alone = torch.cat(
        [input_gradient(model, x[i : i + 1], climb.take(torch.tensor([i])))[0] for i in range(7)]
    )
    assert torch.allclose(together, alone, atol=1e-7)


def test_pgd_runs_one_forward_pass_per_step():
    model, calls = Busy(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    attack(num_steps=7)(model, torch.rand(2, 1, 8, 8), torch.arange(2), ThreatModel("linf", 0.1))
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "fgsm", "num_steps": 3}, "takes one step"),
        ({"name": "fgsm", "start": "uniform"}, "fgsm_rs"),
        ({"num_restarts": 2, "start": "none"}, "same result"),
        ({"loss": "kl", "start": "none"}, "gaussian"),
        ({"step_size": 0}, "greater than 0"),
        ({"name": "pgd", "noise": 2.0}, "n_fgsm"),
        ({"name": "fgsm", "momentum": 1.0}, "one step"),
        ({"loss": "kl", "target": "random"}, "ce or margin"),
        ({"loss": "mae", "friendly": 1}, "wrong class"),
        ({"name": "free", "loss": "kl"}, "no loss"),
        ({"loss": "linearity", "start": "none"}, "0 at the clean input"),
        ({"name": "fgsm", "loss": "kl_sym"}, "0 at the clean input"),
    ],
)
def test_attack_config_rejects_invalid_settings(values, message):
    with pytest.raises(ValueError, match=message):
        AttackConfig.model_validate(values)
