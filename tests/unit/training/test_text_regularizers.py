"""VAT, SMART and R3F on the embeddings of texts: what moves, and what is trained."""

from __future__ import annotations

import pytest
import torch

from advtrain.attacks import AttackConfig, build_attack
from advtrain.models import build_model
from advtrain.models.network import attack_view
from advtrain.objective import ObjectiveConfig, ObjectiveModule
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig
from advtrain.threat import ThreatModel

VAT = {"name": "vat"}
SMART = {"name": "pgd", "num_steps": 1, "loss": "kl_sym", "start": "gaussian", "step_size": 0.3}
R3F = {"name": "noise"}


def network():
    torch.manual_seed(3)
    args = {"dim": 8, "channels": 6, "dropout": 0.0}
    return build_model(ModelConfig(name="text_cnn", args=args), TextShape(12, 40), 3).eval()


def ids():
    x = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    x[1, 5:] = x[2, 1:] = 0
    return x


def attacked(model, threat, **settings):
    """Return embeddings (4, 7, 8), the perturbed ones, and the threat model on them."""
    view, z, threat = attack_view(model, ids(), threat)
    run = build_attack(AttackConfig.model_validate(settings), check_inputs=False)
    return z, run(view, z, torch.zeros(4, dtype=torch.long), threat, torch.Generator().manual_seed(5)), threat


@pytest.mark.parametrize("group", ["sample", "token"])
@pytest.mark.parametrize("settings", [VAT, SMART, R3F, R3F | {"start": "gaussian"}])
def test_padding_does_not_move_and_every_token_does(settings, group):
    norm = "l2" if settings == VAT else "linf"
    z, z_adv, _ = attacked(network(), ThreatModel(norm, 0.5, group=group), **settings)
    moved = (z_adv - z).norm(dim=2) > 0
    assert torch.equal(moved, ids() != 0)


def test_vat_moves_each_text_or_each_token_by_eps():
    for group, length in (
        ("sample", lambda d: d.flatten(1).norm(dim=1)),
        ("token", lambda d: d.norm(dim=2)[ids() != 0]),
    ):
        z, z_adv, _ = attacked(network(), ThreatModel("l2", 0.5, group=group), **VAT)
        assert torch.allclose(length(z_adv - z), torch.tensor(0.5), atol=1e-5)


def test_smart_takes_one_signed_step_per_token_from_a_gaussian_start():
    """Oracle: the gradient of KL(p || q) + KL(q || p), in probabilities, at the start."""
    model = network()
    z, z_adv, threat = attacked(model, ThreatModel("linf", 0.2, group="token"), **SMART)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    start = (z + 0.001 * noise * (ids() != 0).unsqueeze(-1)).requires_grad_()
    p, q = model(z, embedded=True).softmax(1).detach(), model(start, embedded=True).softmax(1)
    (gradient,) = torch.autograd.grad((p * (p / q).log() + q * (q / p).log()).sum(), start)
    wanted = (start - z + 0.3 * gradient.sign()).clamp(-0.2, 0.2)
    sure = (gradient.abs() > 1e-3 * gradient.abs().max()) & (ids() != 0).unsqueeze(-1)
    assert sure.float().mean() > 0.3
    assert torch.allclose((z_adv - z)[sure], wanted[sure], atol=1e-6)
    assert threat.distance(z_adv, z).max() <= 0.2 + 1e-6


def test_kl_sym_trains_the_embeddings_through_both_predictions():
    """Oracle: the gradient of l(e) + 2 KLsym(p(e), p(e + d)) with constant d. R3F's code detaches e in p(e + d)."""
    model, x, y = network(), ids(), torch.tensor([0, 1, 2, 0])
    z, z_adv, threat = attacked(model, ThreatModel("linf", 0.3), **R3F)
    loss, _ = ObjectiveModule(ObjectiveConfig(clean_ce=1, kl_sym=2), model)(x, z_adv, y, threat)
    (found,) = torch.autograd.grad(loss.sum(), model.network.table.weight)
    gradients = []
    for base in (model.embed(x), model.embed(x).detach()):
        p = model(model.embed(x), embedded=True).softmax(1)
        q = model(base + (z_adv - z), embedded=True).softmax(1)
        divergence = (p * (p / q).log() + q * (q / p).log()).sum(1)
        total = (-p[torch.arange(4), y].log() + 2 * divergence).sum()
        gradients.append(torch.autograd.grad(total, model.network.table.weight)[0])
    both, detached = gradients
    assert torch.allclose(found, both, atol=1e-5)
    assert not torch.allclose(found, detached, atol=1e-3)
