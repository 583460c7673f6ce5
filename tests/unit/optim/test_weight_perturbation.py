"""Weight perturbation and averaging against their formulas; exact restoration of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advtrain.optim import OptimizerConfig
from advtrain.optim.averaging import build_average, recompute_statistics
from advtrain.optim.weight_perturbation import perturbed_weights


def config(**values):
    return OptimizerConfig.model_validate({"name": "sgd", "lr": 0.1} | values)


def with_gradients():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model(torch.rand(11, 5)).square().sum().backward()
    return model, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_sam_moves_weights_by_rho_along_gradient():
    model, before = with_gradients()
    length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    with perturbed_weights(config(sam_rho=0.3), model):
        for name, p in model.named_parameters():
            assert torch.allclose(p, before[name] + 0.3 * p.grad / length, atol=1e-6)


def test_awp_moves_matrices_by_gamma_of_norm_and_keeps_vectors():
    model, before = with_gradients()
    with perturbed_weights(config(awp_gamma=0.01), model):
        for name, p in model.named_parameters():
            w = before[name]
            moved = w + 0.01 * w.norm() * p.grad / p.grad.norm() if p.dim() > 1 else w
            assert torch.allclose(p, moved, atol=1e-7), name
            if p.dim() > 1:
                assert float((p.detach() - w).norm() / w.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("values", [{"sam_rho": 0.3}, {"awp_gamma": 0.01}])
@pytest.mark.parametrize("fails", [False, True])
def test_perturbed_weights_are_restored_bit_identical_also_after_error(values, fails):
    model, before = with_gradients()
    try:
        with perturbed_weights(config(**values), model):
            assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("values", [{"sam_rho": 0.3}, {"awp_gamma": 0.01}])
def test_perturbed_weights_ignores_vanished_gradient(values):
    """Division by an underflowed norm would move weights by 10^11."""
    model, before = with_gradients()
    for p in model.parameters():
        p.grad.fill_(1e-25)
    with perturbed_weights(config(**values), model):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_ema_follows_formula_and_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = build_average(config(ema_decay=0.9), model)
    expected = None
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        model(torch.rand(4, 2))
        average.update_parameters(model)
        w = model[0].weight.detach().clone()
        expected = w if expected is None else 0.9 * expected + 0.1 * w
    assert torch.allclose(average.module[0].weight, expected, atol=1e-6)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_swa_is_mean_of_weights():
    model = nn.Linear(3, 2)
    average = build_average(config(swa_start_epoch=0), model)
    seen = []
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update_parameters(model)
        seen.append(model.weight.detach().clone())
    assert torch.allclose(average.module.weight, torch.stack(seen).mean(0), atol=1e-6)


def test_recomputed_statistics_are_the_mean_over_the_batches():
    """Oracle: batch means and unbiased variances averaged by hand."""
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(9.0)
    batches = [torch.rand(6, 3) for _ in range(4)]
    recompute_statistics(norm, batches)
    assert torch.allclose(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-6)
    assert norm.momentum == 0.1
